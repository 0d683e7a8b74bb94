// The list of jobs: live, in pages, and by filters that have their address.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
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
    await page.getByLabel("Name or id contains").fill("cT ");
    await shows(["CT failed", "CT running"]);
    await page.getByLabel("Running", { exact: true }).check();
    await shows(["CT running"]);
    await page.reload();
    await shows(["CT running"]);
    assert.ok(await page.getByLabel("Running", { exact: true }).isChecked());
    await provider.append(failed, { kind: "step", stepTag: "s1" });
    await shows(["CT failed", "CT running"]);
    await provider.append(running, { kind: "complete" });
    await shows(["CT failed"]);
    await page.getByLabel("Name or id contains").fill("nothing");
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
      const said = count < 120 ? `${count} jobs, older ones follow` : "120 jobs";
      await page.locator("#list-n", { hasText: new RegExp(`^${said}$`) }).waitFor();
      assert.deepEqual(
        await names(page),
        Array.from({ length: count }, (_, i) => `Job ${120 - i}`),
      );
      if (count < 120) await page.getByRole("button", { name: "Show older jobs" }).click();
    }
    assert.ok(!(await page.locator("#more").isVisible()));
  }),
);

test(
  "a label of a job becomes a filter, with others, and no longer is one",
  withPage(async page => {
    const { provider, customer } = await parties();
    const job = (name, labels) => provider.createJob(customer, { name, labels });
    await job("First", { ward: "3 b", unit: "ct-2" });
    await job("Second", { ward: "3 b" });
    await job("Third", { ward: "4", '<b x="y">': "<script>" });
    await signIn(page, world.server.origin, customer, PASSWORD);
    const shows = expected =>
      page.waitForFunction(
        expected => JSON.stringify([...document.querySelectorAll("#jobs > tr a")].map(a => a.textContent)) === expected,
        JSON.stringify(expected),
      );
    await shows(["Third", "Second", "First"]);
    await page.getByRole("button", { name: "ward=3 b" }).first().click();
    await shows(["Second", "First"]);
    assert.equal(await page.getByLabel("Labels, all of them").inputValue(), "ward=3 b");
    await page.getByRole("button", { name: "unit=ct-2" }).click();
    await shows(["First"]);
    await page.reload();
    await shows(["First"]);
    const chip = page.getByRole("button", { name: "ward=3 b" });
    assert.equal(await chip.getAttribute("aria-pressed"), "true");
    await chip.press("Enter");
    await page.getByRole("button", { name: "unit=ct-2" }).press("Enter");
    await shows(["Third", "Second", "First"]);
    await page.getByLabel("Labels, all of them").fill("ward");
    await page.getByText("No job is like that").waitFor();
  }),
);

test(
  "the month has the jobs of each day by status, as bars and as a table",
  withPage(async page => {
    const { provider, customer } = await parties();
    const jobs = [];
    for (let i = 0; i < 5; i++) jobs.push(await provider.createJob(customer, { name: `Job ${i}`, labels: { odd: `${i % 2}` } }));
    await provider.append(jobs[0], { kind: "complete" });
    await provider.append(jobs[1], { kind: "complete" });
    await provider.append(jobs[2], { kind: "error", name: "broken" });
    await signIn(page, world.server.origin, customer, PASSWORD);
    await page.getByText("5 jobs, 2 complete, 1 failed, 2 pending").waitFor();
    const now = new Date(),
      title = now.toLocaleDateString("en-GB", { month: "long", year: "numeric" });
    assert.equal(await page.locator("#month").textContent(), title);
    assert.deepEqual(
      await page.locator("#plot rect").evaluateAll(bars => bars.map(bar => bar.dataset.s)),
      ["complete", "failed", "pending"],
    );
    assert.ok((await page.locator("#plot title").allTextContents()).includes(`${now.getDate()} ${title}: 2 complete, 1 failed, 2 pending`));
    await page.getByText("The same as a table").press("Enter");
    const cells = page.locator("#plot-t tbody tr").nth(now.getDate() - 1);
    assert.equal((await cells.innerText()).replaceAll(/\s+/g, " "), `${now.getDate()} ${title.slice(0, 3)} 2 – – 1 – 2`);
    await page.getByLabel("Labels, all of them").fill("odd=1");
    await page.getByText("2 jobs, 1 complete, 1 pending").waitFor();
    assert.ok(await page.getByRole("button", { name: "Month after" }).isDisabled());
    await page.getByRole("button", { name: "Month before" }).press("Enter");
    await page.locator("#month-n", { hasText: /^0 jobs$/ }).waitFor();
    assert.match(page.url(), /month=\d{4}-\d\d/);
    await page.reload();
    await page.locator("#month-n", { hasText: /^0 jobs$/ }).waitFor();
    assert.notEqual(await page.locator("#month").textContent(), title);
    await page.getByRole("button", { name: "Month after" }).press("Enter");
    await page.getByText("2 jobs, 1 complete, 1 pending").waitFor();
  }),
);

test(
  "all jobs that match are downloaded, and no cell is a formula",
  withPage(async page => {
    const { provider, customer } = await parties();
    for (let i = 0; i < 130; i++) await provider.createJob(customer, { name: i % 2 ? `=job "${i}"` : `plain ${i}` });
    await signIn(page, world.server.origin, customer, PASSWORD);
    await page.getByLabel("Name or id contains").fill("=JOB");
    await page.getByText("50 jobs, older ones follow").waitFor();
    const waiting = page.waitForEvent("download");
    await page.getByRole("button", { name: "Download CSV" }).press("Enter");
    const file = await waiting;
    assert.match(file.suggestedFilename(), /^jobs-\d{4}-\d\d-\d\d\.csv$/);
    const lines = (await readFile(await file.path(), "utf8")).split("\r\n");
    assert.equal(lines.pop(), "");
    assert.equal(lines.length, 66);
    assert.match(lines[0], /^"job_id","provider_job_id","provider_job_name","status"/);
    assert.ok(lines[1].includes(`"'=job ""1"""`), lines[1]);
    assert.ok(lines[65].includes(`"'=job ""129"""`));
  }),
);
