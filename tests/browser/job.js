// A job, followed live.

import assert from "node:assert/strict";
import { test } from "node:test";
import { connection, finish, jobUrl, signIn } from "./support/browser.js";
import { assertShowsAll, noteRows, waitForCount } from "./support/dom.js";
import { PASSWORD } from "./support/grpc.js";
import { Server } from "./support/server.js";
import { STEPS, story } from "./support/story.js";
import { openAsProvider, withPage, world } from "./support/world.js";

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
    await page.clock.fastForward(3600_000);
    await page.waitForFunction(() => document.querySelector("#connection").dataset.s === "live");
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
    const reason = Buffer.concat([Buffer.from([10, 12]), Buffer.from("LOG_SET_BACK")]).toString("base64");
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
          details: [{ type: "google.rpc.ErrorInfo", value: reason }],
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

test("a job whose events were removed shows how it ended", async t => {
  const server = await Server.start(["--retention-s", "1"]),
    page = await world.browser.page();
  t.after(() => server.stop());
  const customer = await server.grpc.signUp("customer"),
    provider = await server.grpc.signUp("provider");
  await provider.register(STEPS);
  const job = await provider.createJob(customer),
    { secret } = await provider.share(job, 3600);
  await provider.append(job, ...story(STEPS.length));
  while (
    await provider.listEvents(job).then(
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
  await finish(page);
});
