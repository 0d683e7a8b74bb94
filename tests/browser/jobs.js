// The list of jobs: live, in pages, and by filters that have their address.

import assert from "node:assert/strict";
import { test } from "node:test";
import { connection, signIn } from "./support/browser.js";
import { PASSWORD } from "./support/grpc.js";
import { STEPS, story } from "./support/story.js";
import { withPage, world } from "./support/world.js";

const names = page => page.locator("#jobs > tr a").allTextContents();
const row = (page, job) => page.locator(`[data-job="${job.id}"]`);

async function parties() {
  const { grpc } = world.server,
    provider = await grpc.signUp("provider"),
    customer = await grpc.signUp("customer");
  await provider.register(STEPS);
  return { provider, customer };
}

test(
  "the list follows its jobs live, and shows those that are created",
  withPage(async page => {
    const { provider, customer } = await parties();
    const first = await provider.createJob(customer, { name: "First" });
    await signIn(page, world.server.origin, customer, PASSWORD);
    await connection(page, "live");
    await row(page, first).getByText("Pending").waitFor();
    // The row moves by the event alone, without a reading of the list.
    await page.route("**/ListJobs", route => route.abort());
    await provider.append(first, ...story(3));
    await row(page, first).getByText(/^13\s%$/).waitFor();
    await row(page, first).getByText("Running").waitFor();
    await page.unroute("**/ListJobs");
    const second = await provider.createJob(customer, { name: "Second" });
    await provider.append(second, ...story(STEPS.length));
    await row(page, second).getByText("Complete").waitFor();
    assert.deepEqual(await names(page), ["Second", "First"]);
    // A job without an event is seen, too, a little later.
    await provider.createJob(customer, { name: "Third" });
    await page.getByRole("link", { name: "Third" }).waitFor();
    await page.getByRole("link", { name: "First" }).click();
    await page.locator("#percent:text-is('13')").waitFor();
    await page.goBack();
    await row(page, second).waitFor();
  }),
);

test(
  "filters combine, keep their address, and a job comes and goes with its status",
  withPage(async page => {
    const { provider, customer } = await parties(),
      other = await world.server.grpc.signUp("customer", { firstName: "Klinik", lastName: "Nord" });
    await provider.register([], { tag: "import", name: "Import", version: "1.0.0" });
    const running = await provider.createJob(customer, { name: "CT running" }),
      failed = await provider.createJob(other, { name: "CT failed" }),
      empty = await provider.createJob(other, { name: "Import", tag: "import" });
    await provider.append(running, ...story(1));
    await provider.append(failed, { kind: "error", name: "broken" });
    await signIn(page, world.server.origin, provider, PASSWORD);
    await row(page, empty).waitFor();
    const shows = expected =>
      page.waitForFunction(
        expected => JSON.stringify([...document.querySelectorAll("#jobs > tr a")].map(a => a.textContent)) === expected,
        JSON.stringify(expected),
      );
    await page.getByLabel("Name begins with").fill("CT");
    await shows(["CT failed", "CT running"]);
    await page.getByLabel("Running").check();
    await shows(["CT running"]);
    await page.reload();
    await shows(["CT running"]);
    assert.ok(await page.getByLabel("Running").isChecked());
    await provider.append(failed, { kind: "step", stepTag: "s1" });
    await shows(["CT failed", "CT running"]);
    await provider.append(running, { kind: "complete" });
    await shows(["CT failed"]);
    await page.getByLabel("Name begins with").fill("nothing");
    await page.getByRole("button", { name: "Clear the filters" }).click();
    await shows(["Import", "CT failed", "CT running"]);
    await page.getByLabel("Counterpart").selectOption({ label: "Klinik Nord" });
    await shows(["Import", "CT failed"]);
    await page.getByLabel("Configuration").fill("import");
    await shows(["Import"]);
    await page.getByLabel("Configuration").fill("unknown");
    await page.getByText("You have no configuration with this tag.").waitFor();
    await page.getByLabel("Configuration").fill("");
    await page.getByLabel("Open or closed").selectOption("closed");
    await page.getByText("No job is like that").waitFor();
    await page.getByLabel("Counterpart").selectOption("");
    await shows(["CT running"]);
    await page.getByLabel("Created from").fill("2999-01-01");
    await page.getByText("No job is like that").waitFor();
  }),
);

test(
  "older jobs come in pages",
  withPage(async page => {
    const { provider, customer } = await parties();
    for (let i = 1; i <= 120; i++) await provider.createJob(customer, { name: `Job ${i}` });
    await signIn(page, world.server.origin, customer, PASSWORD);
    for (const count of [50, 100, 120]) {
      await page.getByText(count < 120 ? `${count} jobs, older ones follow` : "120 jobs").waitFor();
      assert.deepEqual(
        await names(page),
        Array.from({ length: count }, (_, i) => `Job ${120 - i}`),
      );
      if (count < 120) await page.getByRole("button", { name: "Show older jobs" }).click();
    }
    assert.ok(!(await page.locator("#more").isVisible()));
  }),
);
