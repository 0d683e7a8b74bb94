// A job, followed live.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connection, finish, jobUrl, signIn } from "./support/browser.js";
import { assertShowsAll, noteRows, shownStep, waitForCount } from "./support/dom.js";
import { PASSWORD } from "./support/grpc.js";
import { Server } from "./support/server.js";
import { STEPS, story } from "./support/story.js";
import { openAs, openAsProvider, withPage, world } from "./support/world.js";

async function sharedJob(steps, options) {
  const job = await world.provider.createJob(world.customer, { name: "CT chest, follow-up" });
  if (steps) await world.provider.append(job, ...story(steps, options));
  const { secret } = await world.provider.share(job, 3600);
  return { job, url: jobUrl(world.server.origin, job, secret) };
}

test(
  "a job is followed from its first event to its end",
  withPage(async page => {
    const { job, url } = await sharedJob(0);
    await page.goto(url);
    await connection(page, "live");
    assert.equal(await page.locator("#status").textContent(), "Pending");
    assert.equal(await page.locator("#percent").textContent(), "0");
    await noteRows(page);
    const events = story(STEPS.length, { trouble: true });
    for (const event of events) {
      const answer = await world.provider.append(job, event);
      // The percent is the server's, never computed here.
      await page.locator(`#percent:text-is('${answer.events[0].progress.percent}')`).waitFor();
    }
    await connection(page, "complete");
    assert.equal(await page.locator("#status").textContent(), "Complete");
    assert.equal(await page.locator("#percent").textContent(), "100");
    assert.equal(await page.locator("#bar").getAttribute("aria-valuenow"), "100");
    assert.deepEqual(
      await page
        .locator("#steps > [data-step]")
        .evaluateAll(rows => rows.map(row => [row.dataset.step, row.dataset.s])),
      STEPS.map(({ tag }) => [tag, tag === "s5" ? "healed" : "done"]),
    );
    assert.match(
      await page.locator(".plate").innerText(),
      /Report is ready for review[^]*with one error on the way, recovered/,
    );
    assert.equal(
      await page.locator(".plate a").getAttribute("href"),
      "https://files.northlight.example/4711/report.pdf",
    );
    assert.match(await page.title(), /^100\s% Complete – CT chest/);
    await assertShowsAll(page, await world.provider.listEvents(job));
  }),
);

test(
  "a job shows the same whether it was watched or is opened at its end",
  withPage(async page => {
    const { job, url } = await sharedJob(STEPS.length, { trouble: true });
    await page.goto(url);
    await connection(page, "complete");
    assert.equal(await page.locator("#percent").textContent(), "100");
    await assertShowsAll(page, await world.provider.listEvents(job));
  }),
);

test(
  "a failed job names its error and recovers with the next step",
  withPage(async page => {
    const { job, url } = await sharedJob(4);
    await world.provider.append(job, { kind: "error", name: "Out of GPU memory", stepTag: "s5" });
    await page.goto(url);
    await connection(page, "live");
    assert.equal(await page.locator("#status").textContent(), "Failed");
    assert.match(await page.locator(".plate").innerText(), /Out of GPU memory[^]*in step 5\. The job is still open/);
    assert.equal(await page.locator("[data-step=s5]").getAttribute("data-s"), "failed");
    await world.provider.append(job, { kind: "step", stepTag: "s5" });
    await page.locator("#status[data-s=running]").waitFor();
    await page.locator(".plate").waitFor({ state: "detached" });
    // The error leads to the event that recovered it.
    await page.locator(".healed button").click();
    assert.equal(await page.evaluate(() => document.activeElement.dataset.sequence), "6");
  }),
);

/** A report that a step is under way; `s5` weighs 12 of the 100 points. */
const report = (stepPercent, rest = {}) => ({ kind: "progress", stepTag: "s5", stepPercent, ...rest });

/** What a reload must not change. */
const shown = page =>
  page.evaluate(() => ({
    percent: document.querySelector("#percent").textContent,
    bar: document.querySelector("#bar").ariaValueText,
    readout: document.querySelector("#readout").textContent,
    steps: [...document.querySelectorAll("#steps > [data-step]")].map(row => [
      row.dataset.s,
      row.querySelector("small").textContent,
      row.querySelector(".mark").style.getPropertyValue("--part"),
    ]),
    lines: [...document.querySelectorAll("#events > li")].map(row => row.querySelector("div").textContent),
    counts: document.querySelector("#kinds").textContent,
  }));

// Fills stand where they belong at once.
const STILL = { reducedMotion: "reduce" };

test(
  "a step under way shows how far it is, in the bar, the table and the line below, until it is done",
  withPage(async page => {
    const { job, url } = await sharedJob(4);
    await page.goto(url);
    await connection(page, "live");
    assert.equal((await shownStep(page, "s5")).state, "todo");
    const append = async event => {
      const { events } = await world.provider.append(job, event);
      await waitForCount(page, events[0].sequence);
      return events[0].progress.percent;
    };
    for (const [event, words, filled, percent] of [
      [{ kind: "info", name: "Begun", stepTag: "s5" }, "Under way", 0, 21],
      [report(10), "Under way, 10 %", 10, 22],
      [report(40), "Under way, 40 %", 40, 25],
      [report(40, { name: "Still at it" }), "Under way, 40 %", 40, 25],
      // A lower percent, or none, changes nothing.
      [report(30), "Under way, 40 %", 40, 25],
      [{ kind: "progress", stepTag: "s5" }, "Under way, 40 %", 40, 25],
    ]) {
      assert.equal(await append(event), percent, words);
      assert.deepEqual(await shownStep(page, "s5"), { state: "now", bar: "now", words, filled });
      assert.equal(await page.locator("#percent").textContent(), `${percent}`);
      assert.equal(await page.locator("#needle").getAttribute("x"), `${percent}%`);
      const said = words.replace(" %", "\u00a0%");
      assert.match(
        await page.locator("#readout").textContent(),
        new RegExp(`^5\\s+Register to atlas · ${said} · weighs 12\\s%, 12 of 100 points · begun \\d\\d:\\d\\d:\\d\\d$`),
      );
      assert.equal(
        await page.locator("#bar").getAttribute("aria-valuetext"),
        `${percent} percent, 4 of 14 steps done. Register to atlas: ${said}`,
      );
    }
    assert.equal(await page.locator("#steps-n").textContent(), "4 of 14 done");
    // Blue is now: a light tint, and the full colour as far as the step is.
    const colours = await page
      .locator("#bar .mark")
      .nth(4)
      .evaluate(mark => [null, "::before"].map(part => getComputedStyle(mark, part).backgroundColor));
    assert.deepEqual(colours, ["rgb(205, 220, 248)", "rgb(21, 80, 192)"]);
    // The line of its reports has the last percent that one of them tells.
    assert.match(await page.locator("#events > li").last().innerText(), /Register to atlas\s+30\s%\s+5 reports/);
    // On the clock it goes from its first event to now.
    const clock = page.locator("[data-step=s5] .c-wf i").first();
    const [x, w] = await clock.evaluate(bar =>
      ["--x", "--w"].map(each => parseFloat(bar.style.getPropertyValue(each))),
    );
    assert.ok(await clock.isVisible());
    assert.ok(x < 100 && Math.abs(x + w - 100) < 0.2, `from ${x} %, ${w} % wide`);
    assert.match(await page.locator("[data-step=s5] .c-d").textContent(), /^\d+\ss$/);
    // The pointer reads another step; without it the line goes back.
    await page.locator("[data-step=s2]").hover();
    await page.locator("#readout:has-text('Remove identity')").waitFor();
    await page.locator("#name").hover();
    await page.locator("#readout:has-text('Under way, 40')").waitFor();

    const before = await shown(page);
    await page.reload();
    await connection(page, "live");
    await waitForCount(page, 10);
    assert.deepEqual(await shown(page), before);

    assert.equal(await append({ kind: "step", stepTag: "s5" }), 33);
    assert.deepEqual(await shownStep(page, "s5"), { state: "done", bar: "done", words: "Done", filled: 0 });
    assert.match(
      await page.locator("#readout").textContent(),
      /^5 of 14 steps done\. Latest: 5\s+Register to atlas at /,
    );
    assert.equal(await page.locator("#bar").getAttribute("aria-valuetext"), "33 percent, 5 of 14 steps done");
    // After its end a report of the step changes nothing.
    assert.equal(await append(report(50)), 33);
    assert.deepEqual(await shownStep(page, "s5"), { state: "done", bar: "done", words: "Done", filled: 0 });
    await assertShowsAll(page, await world.provider.listEvents(job));
  }, STILL),
);

for (const [duration, options] of [
  ["0.4s", {}],
  ["0s", STILL],
])
  test(
    `fills move in ${duration} where ${duration === "0s" ? "less motion is wished" : "nothing else is wished"}`,
    withPage(async page => {
      const { job, url } = await sharedJob(4);
      await world.provider.append(job, report(40));
      await page.goto(url);
      await connection(page, "live");
      await waitForCount(page, 5);
      const durations = await page.evaluate(() => {
        const fill = (selector, part) => getComputedStyle(document.querySelector(selector), part);
        return [fill("#bar .mark", "::before"), fill("#steps .mark", "::before"), fill("#events .mini i")].map(
          style => style.transitionDuration,
        );
      });
      assert.deepEqual(durations, [duration, duration, duration]);
    }, options),
  );

test(
  "reports of one step in a row are one line, which a search and a print take apart",
  withPage(async page => {
    const { job, url } = await sharedJob(4);
    await world.provider.append(job, report(10, { name: "Loading" }));
    await page.goto(url);
    await connection(page, "live");
    await waitForCount(page, 5);
    await noteRows(page);
    const line = page.locator("#events > li").last(),
      text = async () => (await line.locator("div").innerText()).replace(/\s+/g, " ").trim();
    assert.equal(await text(), "Progress Loading in Register to atlas 10 %");
    await line.evaluate(row => {
      window.line = row;
      row.focus();
    });
    await world.provider.append(job, report(40, { name: "Fitting", metadata: { Iterations: 80 } }));
    await waitForCount(page, 6);
    assert.match(await line.innerText(), /Iterations\s+80/);
    await world.provider.append(job, report(40));
    await waitForCount(page, 7);
    assert.equal(await text(), "Progress Register to atlas 40 % 3 reports");
    assert.doesNotMatch(await line.innerText(), /Iterations/);
    assert.equal(await line.locator(".n").textContent(), "7");
    assert.equal(await page.locator("#events > li").count(), 5);
    // The line is moved, not made again: the focus and the fill stay in it.
    assert.ok(await line.evaluate(row => row === window.line && row === document.activeElement));
    assert.deepEqual(await page.evaluate(() => window.added), []);
    assert.equal(await line.locator(".mini").evaluate(fill => fill.style.getPropertyValue("--part")), "40%");
    assert.equal(await line.locator(".mini").getAttribute("data-s"), "now");
    // It is no new row, which would blink.
    assert.equal(await page.locator("#events > .new").count(), 0);
    // All events are counted.
    assert.equal(await page.locator("#events-n").textContent(), "7, newest at the bottom");
    assert.equal(await page.locator("[data-kind=progress]").textContent(), "3");
    // Another event, and another step, begin another line.
    await world.provider.append(job, { kind: "info", name: "A note" }, report(50), report(60));
    await world.provider.append(job, report(5, { stepTag: "s6" }), report(70));
    await waitForCount(page, 12);
    const sequences = () =>
      page.locator("#events > li").evaluateAll(rows => rows.map(row => Number(row.dataset.sequence)));
    const merged = [1, 2, 3, 4, 7, 8, 10, 11, 12];
    assert.deepEqual(await sequences(), merged);
    await assertShowsAll(page, await world.provider.listEvents(job));
    // Notes that are left out do not join what stood beside them.
    await page.getByLabel(/Notes/).uncheck();
    await page.getByText("11 found").waitFor();
    assert.deepEqual(
      await sequences(),
      merged.filter(n => n !== 8),
    );
    await page.getByLabel(/Notes/).check();
    await page.locator("#find").fill("register to atlas");
    await page.getByText("6 found").waitFor();
    assert.deepEqual(await sequences(), [5, 6, 7, 9, 10, 12]);
    await page.locator("#find").fill("loading");
    await page.getByText("1 found").waitFor();
    assert.deepEqual(await sequences(), [5]);
    await page.locator("#find").fill("");
    await page.getByText("12, newest at the bottom").waitFor();
    assert.deepEqual(await sequences(), merged);
    await page.evaluate(() => dispatchEvent(new Event("beforeprint")));
    assert.deepEqual(
      await sequences(),
      Array.from({ length: 12 }, (_, i) => i + 1),
    );
    await page.evaluate(() => dispatchEvent(new Event("afterprint")));
    assert.deepEqual(await sequences(), merged);
    // Blue is now: with the end of the step its reports are facts.
    await world.provider.append(job, { kind: "step", stepTag: "s5" });
    await waitForCount(page, 13);
    assert.deepEqual(await page.locator("#events .mini").evaluateAll(fills => fills.map(fill => fill.dataset.s)), [
      "done",
      "done",
      "now",
      "done",
    ]);
  }, STILL),
);

test(
  "a failed job recovers with a report of a step, and its close leaves the step where it was",
  withPage(async page => {
    const { job, url } = await sharedJob(4);
    await world.provider.append(job, report(40), { kind: "error", name: "Out of GPU memory", stepTag: "s5" });
    await page.goto(url);
    await connection(page, "live");
    await waitForCount(page, 6);
    const failed = { state: "failed", bar: "failed", words: "Failed, 40 %", filled: 40 };
    assert.deepEqual(await shownStep(page, "s5"), failed);
    assert.match(await page.locator("#readout").textContent(), /^5\s+Register to atlas · Failed, 40\s% /);
    // A note is no report: it recovers nothing.
    await world.provider.append(job, { kind: "info", name: "Looking into it", stepTag: "s5" });
    await waitForCount(page, 7);
    assert.deepEqual(await shownStep(page, "s5"), failed);
    await world.provider.append(job, report(40));
    await page.locator("#status[data-s=running]").waitFor();
    await page.locator(".plate").waitFor({ state: "detached" });
    assert.deepEqual(await shownStep(page, "s5"), { state: "now", bar: "now", words: "Under way, 40 %", filled: 40 });
    // The error leads to the line that the report is in by now.
    await world.provider.append(job, report(50), report(60));
    await waitForCount(page, 10);
    assert.match(await page.locator(".healed").innerText(), /^Recovered by 8\sRegister to atlas/);
    await page.locator(".healed button").click();
    assert.equal(await page.evaluate(() => document.activeElement.dataset.sequence), "10");

    const before = await shown(page);
    await page.reload();
    await connection(page, "live");
    await waitForCount(page, 10);
    assert.deepEqual(await shown(page), before);

    await world.provider.call("JobService", "CloseJob", { jobId: job.id, reason: "No larger GPU is free" });
    await connection(page, "complete");
    assert.equal(await page.locator("#status").textContent(), "Cancelled");
    assert.deepEqual(await shownStep(page, "s5"), { state: "left", bar: "left", words: "Left, 60 %", filled: 60 });
    assert.equal((await shownStep(page, "s6")).words, "Never begun");
    assert.equal(await page.locator("#events .mini").last().getAttribute("data-s"), "done");
    await assertShowsAll(page, await world.provider.listEvents(job));
  }, STILL),
);

test(
  "a job that is closed says why",
  withPage(async page => {
    const { job, url } = await sharedJob(2);
    await page.goto(url);
    await connection(page, "live");
    await world.provider.call("JobService", "CloseJob", { jobId: job.id, reason: "Wrong series was sent" });
    await connection(page, "complete");
    assert.equal(await page.locator("#status").textContent(), "Cancelled");
    assert.match(await page.locator(".plate").innerText(), /Wrong series was sent[^]*at 7\s%\. Nothing more will come/);
    assert.equal(await page.locator("[data-step=s3]").getAttribute("data-s"), "left");
  }),
);

test("a killed server costs no event and shows none twice", async t => {
  const server = await Server.start(),
    page = await world.browser.page();
  t.after(() => server.stop());
  const customer = await server.grpc.signUp("customer"),
    provider = await server.grpc.signUp("provider");
  await provider.register(STEPS);
  const job = await provider.createJob(customer);
  await signIn(page, server.origin, customer, PASSWORD);
  await page.goto(`${server.origin}/#/jobs/${job.id}`);
  await page.locator("#percent").waitFor();
  await connection(page, "live");
  await noteRows(page);
  const append = async (from, to) => {
    for (let i = from; i <= to; i++) await provider.append(job, { kind: "info", name: `note ${i}` });
  };
  for (let round = 0; round < 2; round++) {
    await append(40 * round + 1, 40 * round + 20);
    // The provider goes on: what it appends while the server is away waits for the server.
    const rest = append(40 * round + 21, 40 * round + 40);
    await server.kill();
    await connection(page, "offline");
    assert.match(await page.locator("#plates").innerText(), /No connection/);
    await server.run();
    await rest;
    await waitForCount(page, 40 * (round + 1));
  }
  await connection(page, "live");
  await provider.append(job, { kind: "complete" });
  await connection(page, "complete");
  await assertShowsAll(page, await provider.listEvents(job));
  assert.deepEqual(
    await page.evaluate(() => window.added),
    Array.from({ length: 81 }, (_, i) => i + 1),
  );
  await finish(page);
});

test(
  "a hidden tab holds no stream, and goes on where it was",
  withPage(async page => {
    const { job, url } = await sharedJob(3);
    const streams = new Set();
    page.on("request", request => {
      if (request.url().endsWith("WatchEvents")) streams.add(request);
    });
    page.on("requestfailed", request => streams.delete(request));
    page.on("requestfinished", request => streams.delete(request));
    await page.goto(url);
    await connection(page, "live");
    await noteRows(page);
    assert.equal(streams.size, 1);
    const hide = hidden =>
      page.evaluate(hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
      }, hidden);
    const ended = page.waitForEvent("requestfailed");
    await hide(true);
    await connection(page, "paused");
    await ended;
    assert.equal(streams.size, 0);
    await world.provider.append(job, { kind: "step", stepTag: "s4" });
    await hide(false);
    await connection(page, "live");
    await waitForCount(page, 4);
    assert.equal(streams.size, 1);
    assert.deepEqual(await page.evaluate(() => window.added), [4]);
  }),
);

test(
  "a stream that went silent, as after a sleep, is replaced",
  withPage(async page => {
    // The first stream is answered and then says nothing, as a connection that a sleep cut does.
    const { job, url } = await sharedJob(3);
    let streams = 0;
    await page.clock.install();
    page.on("request", request => {
      if (request.url().endsWith("WatchEvents")) streams++;
    });
    await page.goto(url);
    await connection(page, "live");
    // The device sleeps: its clock jumps, and no heartbeat was heard.
    const second = page.waitForRequest(request => request.url().endsWith("WatchEvents"));
    await page.clock.fastForward(3600_000);
    await second;
    await connection(page, "live");
    await world.provider.append(job, { kind: "step", stepTag: "s4" });
    await waitForCount(page, 4);
    assert.ok(streams >= 2, `${streams} streams`);
  }),
);

test(
  "the events can be sifted by kind and searched over the whole log",
  withPage(async page => {
    const { job, url } = await sharedJob(0);
    for (let batch = 0; batch < 4; batch++)
      await world.provider.append(
        job,
        ...Array.from({ length: 100 }, (_, i) => ({
          kind: i % 10 ? "info" : "error",
          name: `event number ${batch * 100 + i + 1}`,
          metadata: { Marker: i === 7 ? "needle" : "hay" },
        })),
      );
    await page.goto(url);
    await connection(page, "live");
    await waitForCount(page, 400);
    await page.locator("#find").fill("NEEDLE");
    await page.getByText("4 found").waitFor();
    assert.deepEqual(await page.locator("#events > li").evaluateAll(rows => rows.map(row => row.dataset.sequence)), [
      "8",
      "108",
      "208",
      "308",
    ]);
    await page.locator("#find").fill("");
    await page.getByLabel(/Notes/).uncheck();
    await page.getByText("40 found").waitFor();
    await world.provider.append(job, { kind: "error", name: "one more" }, { kind: "info", name: "unseen" });
    await page.getByText("41 found").waitFor();
    await page.locator("#find").fill("nothing like it");
    await page.getByText("No event is like that.").waitFor();
  }),
);

test(
  "scrolling up ends following, and new events are counted until the reader goes back",
  withPage(async page => {
    const { job, url } = await sharedJob(STEPS.length - 1, { trouble: true });
    await world.provider.append(job, ...Array.from({ length: 30 }, (_, i) => ({ kind: "info", name: `note ${i}` })));
    await page.goto(url);
    await connection(page, "live");
    await page.locator("#events").hover();
    await page.mouse.wheel(0, -400);
    await page.locator("#follow[aria-checked=false]").waitFor();
    await world.provider.append(job, { kind: "info", name: "unseen" });
    await page.getByRole("button", { name: "1 new" }).click();
    await page.locator("#follow[aria-checked=true]").waitFor();
    const distance = await page
      .locator("#events")
      .evaluate(list => list.scrollHeight - list.scrollTop - list.clientHeight);
    assert.ok(Math.abs(distance) < 2, `${distance} px from the end`);
  }),
);

test(
  "an embedded job shows its bar and steps alone",
  withPage(async page => {
    const { url } = await sharedJob(3);
    await page.goto(url.replace("/#", "/?embed#"));
    await page.locator("#percent:text-is('13')").waitFor();
    for (const seen of ["#name", "#status", "#percent", "#bar", "#steps"])
      assert.ok(await page.locator(seen).isVisible(), seen);
    for (const unseen of [".top", ".foot", "#events", "#facts", "#meta", "#share"])
      assert.ok(!(await page.locator(unseen).isVisible()), unseen);
  }),
);

test(
  "the provider sees Share, and the customer does not",
  withPage(async page => {
    const { job } = await sharedJob(1);
    await openAsProvider(page, job);
    assert.ok(await page.locator("#share").isVisible());
    const other = await world.browser.page();
    await signIn(other, world.server.origin, world.customer, PASSWORD);
    await other.goto(`${world.server.origin}/#/jobs/${job.id}`);
    await connection(other, "live");
    assert.ok(!(await other.locator("#share").isVisible()));
    await finish(other);
  }),
);

test(
  "a job whose provider is silent is stalled until the provider's next event, in the list too",
  withPage(async page => {
    // Other jobs may be stalled as well.
    const customer = await world.server.grpc.signUp("customer");
    await world.provider.createJob(customer, { name: "Waiting" });
    const job = await world.provider.createJob(customer, { name: "Silent", maxSilence: { seconds: 10 } });
    await world.provider.append(job, ...story(4), report(40));
    await openAsProvider(page, job);
    await connection(page, "live");
    await page.locator("#status[data-s=stalled]").waitFor({ timeout: 60_000 });
    assert.equal(await page.locator("#status").textContent(), "Stalled");
    assert.match(await page.title(), /Stalled – Silent/);
    assert.match(
      await page.locator(".plate[data-s=stalled]").innerText(),
      /Silent for \d+\s(?:s|min)[^]*Last heard of at \d\d:\d\d:\d\d\. The provider may be silent for 10\ss\./,
    );
    assert.deepEqual(await shownStep(page, "s5"), {
      state: "stalled",
      bar: "stalled",
      words: "Silent, 40 %",
      filled: 40,
    });
    assert.match(await page.locator("#events > li").last().innerText(), /Silent/);
    assert.match(await page.locator("#facts").innerText(), /Last event\s+\d+\s(?:s|min)[^]* ago/);
    const color = selector => page.locator(selector).evaluate(element => getComputedStyle(element).color);
    assert.equal(await color("#status"), "rgb(137, 80, 0)", "amber");
    assert.equal(await color("#events > [data-s=silent] .i"), "rgb(137, 80, 0)", "amber");
    assert.ok(await page.locator("#status path").first().getAttribute("d"), "a mark");
    await assertShowsAll(page, await world.provider.listEvents(job));
    const list = await page.context().newPage();
    await signIn(list, world.server.origin, customer, PASSWORD);
    await list.getByLabel("Stalled", { exact: true }).check();
    await list.locator(`[data-job="${job.id}"]`).getByText("Stalled").waitFor();
    // The other one leaves the list when it is read by the filter.
    await list.locator("#jobs > tr").nth(1).waitFor({ state: "detached" });
    await world.provider.append(job, report(50));
    await page.locator("#status[data-s=running]").waitFor();
    await page.locator(".plate").waitFor({ state: "detached" });
    await list.getByText("No job is like that").waitFor();
  }, STILL),
);

test(
  "a silence before the first event counts from the creation of the job",
  withPage(async page => {
    const { job, url } = await sharedJob(0),
      twelveMinutesAgo = Date.now() - 12 * 60_000 - 5000;
    const silent = {
      id: "00000000-0000-7000-8000-000000000001",
      jobId: job.id,
      sequence: "1",
      kind: "EVENT_KIND_SILENT",
      createdAt: new Date(twelveMinutesAgo + 600_000).toISOString(),
      status: "JOB_STATUS_STALLED",
      progress: {},
    };
    await page.route("**/GetJob", async route => {
      const response = await route.fetch(),
        answer = await response.json();
      Object.assign(answer.job, { createdAt: new Date(twelveMinutesAgo).toISOString(), maxSilence: "600s" });
      await route.fulfill({ response, json: answer });
    });
    await page.route("**/WatchEvents", route =>
      route.fulfill({
        status: 200,
        contentType: "application/connect+json",
        body: streamBody([{ resumeToken: "told", events: { events: [silent] } }], { error: { code: "unavailable" } }),
      }),
    );
    await page.goto(url);
    assert.match(
      await page.locator(".plate[data-s=stalled]").innerText(),
      /Silent for 12\smin[^]*Created at \d\d:\d\d:\d\d\. The provider may be silent for 10\smin\./,
    );
    assert.match(await page.locator("#facts").innerText(), /Waiting/);
  }),
);

test(
  "the customer asks once to cancel, the provider sees who, when and why, and decides",
  withPage(async page => {
    const { job, url } = await sharedJob(3);
    const provider = await world.browser.page(),
      stranger = await world.browser.page();
    await openAsProvider(provider, job);
    await stranger.goto(url);
    await openAs(page, world.customer, job);
    for (const each of [page, provider, stranger]) await connection(each, "live");
    for (const each of [provider, stranger]) assert.ok(!(await each.locator("#ask").isVisible()));
    // A dialog that is closed asks for nothing.
    await page.getByRole("button", { name: "Ask to cancel" }).click();
    await page.getByRole("button", { name: "Close" }).click();
    await page.locator("dialog").waitFor({ state: "detached" });
    await page.locator("#ask").click();
    const dialog = page.getByRole("dialog", { name: "Ask to cancel" });
    await dialog.getByLabel("Reason, for the provider").fill("Patient asked us to stop <b>");
    // What is refused is told in the dialog, and the reason stays.
    await page.route("**/RequestCancellation", route =>
      route.fulfill({ status: 503, json: { code: "unavailable", message: "Try again later." } }),
    );
    await dialog.getByRole("button", { name: "Ask to cancel" }).click();
    await dialog.getByRole("alert").getByText("Try again later.").waitFor();
    await page.unroute("**/RequestCancellation");
    await dialog.getByRole("button", { name: "Ask to cancel" }).click();
    await page.locator("dialog").waitFor({ state: "detached" });
    for (const each of [page, provider, stranger]) {
      await each.locator(".plate[data-s=look]").waitFor();
      assert.match(
        await each.locator(".plate").innerText(),
        /Cancellation is asked for\s+Amara Okafor, \d+ \w+ \d+, \d\d:\d\d: “Patient asked us to stop <b>”\s+The provider decides/,
      );
      assert.match(await each.locator("#events > li").last().innerText(), /Cancellation requested Patient asked us/);
      assert.equal(await each.locator("#status").textContent(), "Running");
    }
    await page.locator("#ask").waitFor({ state: "hidden" });
    await assertShowsAll(page, await world.provider.listEvents(job));
    await page.reload();
    await connection(page, "live");
    await page.getByText("Patient asked us to stop").first().waitFor();
    assert.ok(!(await page.locator("#ask").isVisible()), "asked once");
    await world.provider.call("JobService", "CloseJob", { jobId: job.id, reason: "As the customer asked" });
    await connection(page, "complete");
    await page.locator(".plate[data-s=look]").waitFor({ state: "detached" });
    assert.match(await page.locator(".plate").innerText(), /As the customer asked/);
    for (const each of [provider, stranger]) await finish(each);
  }),
);

test(
  "nobody asks to cancel a job that is closed, and a request before the first event begins nothing",
  withPage(async page => {
    const closed = await world.provider.createJob(world.customer),
      pending = await world.provider.createJob(world.customer);
    await world.provider.call("JobService", "CloseJob", { jobId: closed.id });
    await world.customer.call("JobService", "RequestCancellation", { jobId: pending.id });
    await openAs(page, world.customer, closed);
    await connection(page, "complete");
    assert.ok(!(await page.locator("#ask").isVisible()));
    await page.goto(`${world.server.origin}/#/jobs/${pending.id}`);
    await page.getByText("Cancellation is asked for").waitFor();
    assert.equal(await page.locator("#status").textContent(), "Pending");
    assert.match(await page.locator("#facts").innerText(), /Created[^]*Waiting/);
  }),
);

test(
  "the estimate is shown while the job runs, and asked for after each step and each minute",
  withPage(async page => {
    const { job, url } = await sharedJob(3);
    await page.clock.install();
    const bodies = [],
      minutes = 60_000;
    let answer = () => ({ noEstimate: "NO_ESTIMATE_REASON_TOO_FEW_JOBS" });
    await page.route("**/EstimateJob", route => {
      bodies.push(route.request().postDataJSON());
      const json = answer();
      return json ? route.fulfill({ json }) : route.fulfill({ status: 503, json: { code: "unavailable" } });
    });
    const asked = async count => {
      while (bodies.length < count) await page.evaluate(() => new Promise(requestAnimationFrame));
    };
    const facts = async () => (await page.locator("#facts").innerText()).replace(/\s+/g, " ");
    await page.goto(url);
    await connection(page, "live");
    await asked(1);
    assert.deepEqual(bodies[0], { jobId: job.id });
    assert.doesNotMatch(await facts(), /Likely|Nine/);
    assert.equal(await page.locator(".ahead").count(), 0);
    // A step asks anew.
    const estimate = (p50, p90) => () => ({
      estimate: {
        p50: new Date(Date.now() + p50 * minutes + 30_000).toISOString(),
        p90: new Date(Date.now() + p90 * minutes + 30_000).toISOString(),
      },
      jobs: 12,
    });
    answer = estimate(12, 20);
    await world.provider.append(job, { kind: "step", stepTag: "s4" });
    await page.getByText("Likely done").waitFor();
    assert.match(await facts(), /Likely done \d\d:\d\d in 12 min Nine in ten by \d\d:\d\d in 20 min Last event/);
    const [p50, p90] = await page
      .locator(".ahead")
      .evaluate(table => ["--p50", "--p90"].map(name => parseFloat(table.style.getPropertyValue(name))));
    assert.ok(p50 > 40 && p50 < p90 && p90 < 92, `${p50} and ${p90} %`);
    // A report of a step, and a note, do not.
    const before = bodies.length;
    await world.provider.append(job, report(10), { kind: "info", name: "a note" });
    await waitForCount(page, 6);
    // A call that fails changes nothing, and a minute later the page asks again.
    answer = () => null;
    await page.clock.runFor(minutes);
    await asked(before + 1);
    assert.match(await facts(), /Likely done .* Nine in ten by/);
    assert.equal(await page.locator(".plate").count(), 0);
    await connection(page, "live");
    // Hours, since the page's clock is ahead by minutes until a server's answer corrects it.
    answer = estimate(330, 390);
    await page.clock.runFor(minutes);
    await page.getByText(/^in 5\sh$/).waitFor();
    assert.match(await facts(), /Likely done .* in 5 h Nine in ten by .* in 6 h/);
    assert.ok(bodies.length <= before + 3, `${bodies.length - before} calls in two minutes`);
    // Nothing is expected of a job that failed or is closed.
    await world.provider.append(job, { kind: "error", name: "broken" });
    await page.locator("#status[data-s=failed]").waitFor();
    assert.doesNotMatch(await facts(), /Likely|Nine/);
    assert.equal(await page.locator(".ahead").count(), 0);
    await world.provider.append(job, { kind: "complete" });
    await connection(page, "complete");
    assert.doesNotMatch(await facts(), /Likely|Nine/);
  }),
);

test(
  "the server's own estimate is shown, by a link too",
  withPage(async page => {
    const provider = await world.server.grpc.signUp("provider");
    await provider.register(STEPS);
    const jobs = [];
    for (let i = 0; i < 12; i++) jobs.push(await provider.createJob(world.customer));
    const job = await provider.createJob(world.customer),
      { secret } = await provider.share(job, 3600);
    // The others take some seconds from their first step on, which is longer than this one has taken when the page asks.
    await Promise.all(jobs.map(each => provider.append(each, ...story(1))));
    await page.goto(jobUrl(world.server.origin, job, secret));
    await connection(page, "live");
    await page.locator("#facts dd", { hasText: /^(9|\d\d)\ss$/ }).waitFor();
    await Promise.all(jobs.map(each => provider.append(each, { kind: "complete" })));
    // The server keeps their times within seconds.
    const fresh = await provider.createJob(world.customer),
      ask = () => provider.call("JobService", "EstimateJob", { jobId: fresh.id });
    for (let tries = 0; !(await ask()).estimate; tries++) {
      assert.ok(tries < 50, "no estimate for a new job");
      await sleep(200);
    }
    await provider.append(job, ...story(1));
    await page.getByText("Nine in ten by").waitFor();
    assert.match(await page.locator("#facts").innerText(), /Likely done\s+\d\d:\d\d\s+in \d+\ss/);
    assert.equal(await page.locator("#steps").locator("xpath=..").getAttribute("class"), "ahead");
  }),
);

/** A stream of Connect in JSON: messages, and how it ends. */
function streamBody(messages, end) {
  return Buffer.concat(
    [...messages.map(message => [0, message]), [2, end]].flatMap(([flags, message]) => {
      const json = Buffer.from(JSON.stringify(message)),
        head = Buffer.alloc(5);
      head[0] = flags;
      head.writeUInt32BE(json.length, 1);
      return [head, json];
    }),
  );
}

test(
  "a log that was set back is forgotten and read again from its beginning",
  withPage(async page => {
    const { job, url } = await sharedJob(3),
      contentType = "application/connect+json";
    const lost = {
      id: "00000000-0000-7000-8000-000000000000",
      jobId: job.id,
      sequence: "1",
      kind: "EVENT_KIND_ERROR",
      name: "lost",
      createdAt: new Date().toISOString(),
      status: "JOB_STATUS_FAILED",
      progress: {},
    };
    const answers = [
      // A history that the database lost afterwards, and a connection that ended.
      streamBody([{ resumeToken: "lost", events: { events: [lost] } }], { error: { code: "unavailable" } }),
      streamBody([], {
        error: {
          code: "out_of_range",
          message: "set back",
          details: [{ type: "google.rpc.ErrorInfo", debug: { reason: "LOG_SET_BACK" } }],
        },
      }),
    ];
    const tokens = [];
    await page.route("**/WatchEvents", route => {
      tokens.push(JSON.parse(route.request().postDataBuffer().subarray(5)).resumeToken);
      const body = answers.shift();
      return body ? route.fulfill({ status: 200, contentType, body }) : route.continue();
    });
    await page.goto(url);
    await connection(page, "live");
    assert.deepEqual(tokens, [undefined, "lost", undefined]);
    await assertShowsAll(page, await world.provider.listEvents(job));
    assert.equal(await page.locator("#status").textContent(), "Running");
    assert.equal(await page.locator("#percent").textContent(), "13");
  }),
);

test(
  "steps are as far as the server tells where their events are not here",
  withPage(async page => {
    const { url } = await sharedJob(0);
    const state = (stepTag, status, percent) => ({ stepTag, status: `STEP_STATUS_${status}`, percent });
    const caughtUp = {
      job: { lastSequence: "9", status: "JOB_STATUS_RUNNING", progress: { percent: 5 } },
      steps: [state("s1", "DONE", 100), state("s2", "UNDER_WAY", 50), state("s3", "UNDER_WAY"), state("s4", "TO_COME")],
    };
    await page.route("**/WatchEvents", route =>
      route.fulfill({
        status: 200,
        contentType: "application/connect+json",
        body: streamBody([{ resumeToken: "told", caughtUp }], { error: { code: "unavailable" } }),
      }),
    );
    await page.goto(url);
    await page.locator("#percent:text-is('5')").waitFor();
    assert.deepEqual(await Promise.all(["s1", "s2", "s3", "s4"].map(tag => shownStep(page, tag))), [
      { state: "done", bar: "done", words: "Done", filled: 0 },
      { state: "now", bar: "now", words: "Under way, 50 %", filled: 50 },
      { state: "now", bar: "now", words: "Under way", filled: 0 },
      { state: "todo", bar: "todo", words: "To come", filled: 0 },
    ]);
    assert.equal(await page.locator("#steps-n").textContent(), "1 of 14 done");
  }, STILL),
);

test("a job whose events were removed shows how it ended", async t => {
  const server = await Server.start(["--retention-s", "1"]),
    page = await world.browser.page();
  t.after(() => server.stop());
  const customer = await server.grpc.signUp("customer"),
    provider = await server.grpc.signUp("provider");
  await provider.register(STEPS);
  const job = await provider.createJob(customer),
    cancelled = await provider.createJob(customer),
    { secret } = await provider.share(job, 3600),
    link = await provider.share(cancelled, 3600);
  await provider.append(job, ...story(STEPS.length));
  await provider.append(cancelled, ...story(4), report(40));
  await provider.call("JobService", "CloseJob", { jobId: cancelled.id, reason: "Wrong series was sent" });
  for (const each of [job, cancelled])
    while (
      await provider.listEvents(each).then(
        () => true,
        () => false,
      )
    )
      await new Promise(resolve => setTimeout(resolve, 200));
  await page.goto(jobUrl(server.origin, job, secret));
  await connection(page, "expired");
  assert.equal(await page.locator("#status").textContent(), "Complete");
  assert.equal(await page.locator("#percent").textContent(), "100");
  await page.getByText("The events of this job were removed").waitFor();
  assert.equal(await page.locator("#steps-n").textContent(), "14 of 14 done");
  await page.goto(jobUrl(server.origin, cancelled, link.secret));
  await page.locator("#status[data-s=cancelled]").waitFor();
  await connection(page, "expired");
  assert.deepEqual(await Promise.all(["s4", "s5", "s6"].map(async tag => (await shownStep(page, tag)).words)), [
    "Done",
    "Left, 40 %",
    "Never begun",
  ]);
  await finish(page);
});
