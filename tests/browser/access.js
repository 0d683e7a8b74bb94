// For everybody: axe, the keyboard alone, narrow windows, and what is spoken.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { test } from "node:test";
import { connection, jobUrl, signIn } from "./support/browser.js";
import { assertFits } from "./support/dom.js";
import { PASSWORD } from "./support/grpc.js";
import { STEPS, story } from "./support/story.js";
import { withPage, world } from "./support/world.js";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const LONG = "Volumetric assessment of both lungs and lobes for Radiology-North-3-A ".repeat(4).slice(0, 256).trim();

async function jobs() {
  const { provider, customer } = world;
  const running = await provider.createJob(customer, { name: "Running" }),
    complete = await provider.createJob(customer, { name: "Complete" }),
    failed = await provider.createJob(customer, { name: "Failed" }),
    stalled = await provider.createJob(customer, { name: "Stalled", maxSilence: { seconds: 10 } }),
    pending = await provider.createJob(customer, { id: LONG.replaceAll(" ", "-"), name: LONG }).catch(() => null);
  const report = (stepTag, stepPercent) => ({ kind: "progress", stepTag, stepPercent });
  await provider.append(running, ...story(7, { trouble: true }), report("s8", 34), report("s8", 58));
  await provider.append(complete, ...story(STEPS.length, { trouble: true }));
  await provider.append(failed, ...story(3), report("s4", 40), {
    kind: "error",
    name: "Out of GPU memory",
    stepTag: "s4",
  });
  await provider.append(stalled, ...story(3), report("s4", 40));
  await customer.call("JobService", "RequestCancellation", { jobId: stalled.id, reason: LONG });
  return { running, complete, failed, pending: pending ?? running, stalled };
}

/** Every view: its name, and how it is opened. */
async function* views(page) {
  const { origin } = world.server,
    { running, complete, failed, pending, stalled } = await jobs(),
    { secret } = await world.provider.share(running, 3600);
  await page.goto(`${origin}/#/sign-up`);
  await page.getByRole("heading", { name: "Sign up" }).waitFor();
  yield "sign-up";
  await page.goto(`${origin}/#/sign-in`);
  await page.getByLabel("E-mail").fill("nobody@example.com");
  await page.getByRole("button", { name: "Sign in", exact: true }).click();
  await page.getByRole("alert").filter({ hasText: "e-mail" }).waitFor();
  yield "sign-in, refused";
  await page.goto(jobUrl(origin, running, "mpw_no"));
  await page.getByText("This link is not valid").waitFor();
  yield "a link that is not valid";
  await page.goto(jobUrl(origin, running, secret));
  await connection(page, "live");
  yield "a shared job";
  await signIn(page, origin, world.provider, PASSWORD);
  await page.locator("#jobs > tr").first().waitFor();
  yield "the list";
  await page.goto(`${origin}/#/jobs?text=nothing`);
  await page.getByText("No job is like that").waitFor();
  yield "an empty list";
  for (const [name, job] of Object.entries({ running, complete, failed, pending })) {
    await page.goto(`${origin}/#/jobs/${job.id}`);
    await page.locator("#percent").waitFor();
    await page.locator("#connection:is([data-s=live], [data-s=complete])").waitFor();
    yield `a ${name} job`;
  }
  await page.goto(`${origin}/#/jobs/${stalled.id}`);
  await page.locator(".plate[data-s=stalled]").waitFor();
  yield "a stalled job that is asked to cancel";
  await page.goto(`${origin}/#/jobs/${running.id}`);
  await page.getByRole("heading", { name: "Running" }).first().waitFor();
  await page.getByRole("button", { name: "Share" }).click();
  await page.getByRole("button", { name: "Make a link" }).click();
  await page.locator("#secret").waitFor();
  yield "the dialog of links";
  await page.keyboard.press("Escape");
  await page.goto(`${origin}/#/keys`);
  await page.getByRole("button", { name: "Make a key" }).click();
  await page.locator("[data-key]").first().waitFor();
  yield "the keys";
  await page.goto(`${origin}/#/profile`);
  await page.getByText("Signed in until").waitFor();
  yield "the profile";
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByLabel("E-mail").waitFor();
  await signIn(page, origin, world.customer, PASSWORD);
  await page.goto(`${origin}/#/jobs/${running.id}`);
  await page.getByRole("button", { name: "Ask to cancel" }).click();
  yield "the dialog to ask";
}

for (const colorScheme of ["light", "dark"]) {
  test(
    `axe finds nothing in any view, in ${colorScheme} colours`,
    withPage(
      async page => {
        for await (const view of views(page)) {
          await page.evaluate(AXE);
          const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
          assert.deepEqual(
            violations.map(
              ({ id, nodes }) =>
                `${id}: ${nodes.map(({ html, failureSummary }) => `${html}\n${failureSummary}`).join("\n")}`,
            ),
            [],
            view,
          );
        }
      },
      { colorScheme, reducedMotion: "reduce" },
    ),
  );
}

for (const width of [360, 320]) {
  test(
    `no view is wider than ${width} px`,
    withPage(
      async page => {
        for await (const view of views(page)) await assertFits(page, view);
      },
      { viewport: { width, height: 740 } },
    ),
  );
}

test(
  "the keyboard alone signs in, finds a job, walks through its events and shares it",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer, { name: "By keyboard" });
    await world.provider.append(job, ...story(7, { trouble: true }));
    const focused = () =>
      page.evaluate(() => {
        const { tagName, id, textContent, name } = document.activeElement;
        return id || name || textContent.trim() || tagName;
      });
    const tabTo = async what => {
      for (let i = 0; i < 60; i++) {
        if ((await focused()) === what) return;
        await page.keyboard.press("Tab");
      }
      assert.fail(`Tab does not come to ${what}`);
    };
    await page.goto(`${world.server.origin}/`);
    await page.getByLabel("E-mail").waitFor();
    await page.keyboard.press("Tab");
    assert.equal(await focused(), "skip");
    await page.keyboard.press("Enter");
    assert.equal(await focused(), "main");
    assert.ok(!page.url().includes("#main"), "the skip link leaves the address alone");
    await tabTo("email");
    await page.keyboard.type(world.provider.email);
    await page.keyboard.press("Tab");
    await page.keyboard.type(PASSWORD);
    await page.keyboard.press("Enter");
    await page.getByRole("link", { name: "By keyboard" }).waitFor();
    await tabTo("By keyboard");
    await page.keyboard.press("Enter");
    await page.locator("#percent").waitFor();
    await connection(page, "live");
    await tabTo("follow");
    await page.keyboard.press("Space");
    assert.equal(await page.locator("#follow").getAttribute("aria-checked"), "false");
    await tabTo("events");
    const at = () => page.evaluate(() => Number(document.activeElement.dataset.sequence));
    for (const [key, sequence] of [
      ["Home", 1],
      ["ArrowDown", 2],
      ["ArrowDown", 3],
      ["ArrowUp", 2],
      ["End", 10],
      ["ArrowUp", 9],
    ]) {
      await page.keyboard.press(key);
      assert.equal(await at(), sequence, key);
    }
    await page.locator("#follow[aria-checked=false]").waitFor();
    await tabTo("share");
    await page.keyboard.press("Enter");
    await page.getByText("There is none yet.").waitFor();
    await tabTo("note");
    await page.keyboard.type("by keyboard");
    await page.keyboard.press("Enter");
    await page.locator("#links li").waitFor();
    assert.equal(await focused(), "secret");
    assert.match(await page.locator("#secret").inputValue(), /token=mpw_/);
    await page.keyboard.press("Escape");
    await page.locator("dialog").waitFor({ state: "detached" });
    assert.equal(await focused(), "share");
  }),
);

test(
  "a change of status and each step that is done are spoken, and nothing else",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer),
      { secret } = await world.provider.share(job, 3600);
    await world.provider.append(job, ...story(2));
    await page.goto(jobUrl(world.server.origin, job, secret));
    await connection(page, "live");
    await page.evaluate(() => {
      window.said = [];
      new MutationObserver(() => window.said.push(document.querySelector("#say").textContent)).observe(
        document.querySelector("#say"),
        { childList: true, characterData: true, subtree: true },
      );
    });
    const said = text => page.waitForFunction(text => window.said.at(-1) === text, text);
    await world.provider.append(job, { kind: "info", name: "a note" });
    await world.provider.append(job, { kind: "progress", stepTag: "s3", stepPercent: 50 });
    await world.provider.append(job, { kind: "step", stepTag: "s3" });
    await said("Running, 13 percent. Done: Resample.");
    await world.provider.append(job, { kind: "error", name: "broken" });
    await said("Failed, 13 percent.");
    await world.provider.append(job, { kind: "complete" });
    await said("Complete, 100 percent.");
    assert.equal(await page.evaluate(() => window.said.length), 3);
  }),
);
