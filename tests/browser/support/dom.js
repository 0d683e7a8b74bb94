// What the page shows, to be compared with what the API lists.

import assert from "node:assert/strict";

/** Every event that the list shows, from its first to its last row, by scrolling through it. */
export async function shownEvents(page) {
  return page.evaluate(() => {
    const list = document.querySelector("#events"),
      found = new Map();
    // The event of a scroll comes with the next frame, and a frame of many rows takes its time: it is sent at once.
    const scroll = top => {
      list.scrollTop = top;
      list.dispatchEvent(new Event("scroll"));
      collect();
    };
    const collect = () => {
      for (const row of list.querySelectorAll(":scope > [data-sequence]"))
        found.set(Number(row.dataset.sequence), {
          sequence: Number(row.dataset.sequence),
          kind: row.dataset.s,
          name: row.querySelector("b")?.textContent ?? "",
          reports: Number(row.dataset.reports ?? 1),
        });
    };
    if (document.querySelector("#follow").ariaChecked === "true") document.querySelector("#follow").click();
    scroll(0);
    while (list.scrollTop + list.clientHeight < list.scrollHeight - 1) scroll(list.scrollTop + list.clientHeight * 0.8);
    return [...found.values()].sort((a, b) => a.sequence - b.sequence);
  });
}

/** The lines of the list: reports of one step in a row are one line, which shows the last of them and their number. */
export const asShown = events =>
  events.flatMap(({ sequence, kind, name, stepTag }, i) => {
    const same = each => each?.kind === "EVENT_KIND_PROGRESS" && each.kind === kind && each.stepTag === stepTag;
    if (same(events[i + 1])) return [];
    let reports = 1;
    while (same(events[i - reports])) reports++;
    return [{ sequence, kind: kind.replace("EVENT_KIND_", "").toLowerCase(), name, reports }];
  });

/** No event is missing, none is there twice and none differs. */
export async function assertShowsAll(page, events) {
  const rows = await page
    .locator("#events > [data-sequence]")
    .evaluateAll(rows => rows.map(row => Number(row.dataset.sequence)));
  assert.equal(new Set(rows).size, rows.length, "a row stands twice in the document");
  assert.deepEqual(await shownEvents(page), asShown(events));
}

/** What the page says of a step: in the table, and the part of its width that is filled in the bar, in percent. */
export const shownStep = (page, tag) =>
  page.locator(`[data-step=${tag}]`).evaluate(row => {
    const mark = document.querySelectorAll("#bar .mark")[[...row.parentNode.children].indexOf(row)],
      part = parseFloat(getComputedStyle(mark, "::before").width) / mark.getBoundingClientRect().width;
    return {
      state: row.dataset.s,
      bar: mark.dataset.s,
      words: row.querySelector("small").textContent.replace("\u00a0", " "),
      filled: Math.round(100 * part),
    };
  });

/** Notes the sequence of each row that is ever put into the list. */
export async function noteRows(page) {
  await page.evaluate(() => {
    window.added = [];
    new MutationObserver(changes => {
      for (const change of changes)
        for (const node of change.addedNodes) window.added.push(Number(node.dataset.sequence));
    }).observe(document.querySelector("#events"), { childList: true });
  });
}

/** Waits until the list has so many events in all. */
export const waitForCount = (page, count) =>
  page.waitForFunction(
    count => Number(document.querySelector("#events > :last-child")?.dataset.sequence) >= count,
    count,
  );

export async function assertFits(page, what) {
  const wide = await page.evaluate(() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    return [...document.querySelectorAll("body *")]
      .filter(element => element.getBoundingClientRect().right > width + 1)
      .map(element => element.outerHTML.slice(0, 120));
  });
  assert.deepEqual(wide, [], `${what} is wider than the window`);
}
