// Many events: at once, and in all.

import assert from "node:assert/strict";
import { test } from "node:test";
import { connection, jobUrl } from "./support/browser.js";
import { assertShowsAll, waitForCount } from "./support/dom.js";
import { withPage, world } from "./support/world.js";

const BATCH = 500;
// A high window shows many rows at once, so that the whole log is scrolled through in few steps.
const HIGH = { viewport: { width: 1100, height: 3000 } };
const MOST_ROWS = 200;

const batch = (from, count) =>
  Array.from({ length: count }, (_, i) => ({
    kind: (from + i) % 50 ? "info" : "error",
    name: `event ${from + i}`,
    metadata: (from + i) % 7 ? undefined : { Volume: from + i, Unit: "mL" },
  }));

async function appendMany(job, from, to) {
  for (let at = from; at <= to; at += BATCH)
    await world.provider.append(job, ...batch(at, Math.min(BATCH, to - at + 1)));
}

async function open(page, job) {
  const { secret } = await world.provider.share(job, 3600);
  await page.goto(jobUrl(world.server.origin, job, secret));
  await connection(page, "live");
}

test(
  "10,000 events that come at once are all shown, and the page stays at hand",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer);
    await open(page, job);
    await Promise.all([
      appendMany(job, 1, 10_000),
      (async () => {
        // Meanwhile the page answers to its reader.
        await page.locator("#find").fill("event 7");
        await page.locator("#find").fill("");
      })(),
    ]);
    await waitForCount(page, 10_000);
    await page.locator("#connection[data-s=live]").waitFor();
    assert.ok((await page.locator("#events > li").count()) < MOST_ROWS, "only a part stands in the document");
    await assertShowsAll(page, await world.provider.listEvents(job));
  }, HIGH),
);

test(
  "2,000 reports of a step are one line, and a search finds each of them",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer);
    await open(page, job);
    for (let batch = 0; batch < 4; batch++)
      await world.provider.append(
        job,
        ...Array.from({ length: BATCH }, (_, i) => ({
          kind: "progress",
          stepTag: "s9",
          stepPercent: Math.floor((batch * BATCH + i) / 21),
          name: `slice ${batch * BATCH + i + 1}`,
        })),
      );
    await waitForCount(page, 2000);
    assert.equal(await page.locator("#events > li").count(), 1);
    assert.match(await page.locator("#events > li").innerText(), /slice 2000 in Find nodules\s+95\s%\s+2,000 reports/);
    assert.equal(await page.locator("#events-n").textContent(), "2,000, newest at the bottom");
    await page.locator("#find").fill("slice 77");
    await page.getByText("11 found").waitFor();
    assert.equal(await page.locator("#events > li").count(), 11);
  }, HIGH),
);

test(
  "a log of 100,000 events is shown from its first to its last",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer);
    await Promise.all([0, 1, 2, 3].map(async part => appendMany(job, 25_000 * part + 1, 25_000 * (part + 1))));
    await open(page, job);
    await waitForCount(page, 100_000);
    await page.getByText("100,000, newest at the bottom").waitFor();
    await world.provider.append(job, { kind: "info", name: "and one more" });
    await waitForCount(page, 100_001);
    assert.ok((await page.locator("#events > li").count()) < MOST_ROWS, "only a part stands in the document");
    await assertShowsAll(page, await world.provider.listEvents(job));
    await page.locator("#find").fill("event 77777");
    await page.getByText("1 found").waitFor();
  }, HIGH),
);
