// Links to a job: what they show, what they do not, and how they end.

import assert from "node:assert/strict";
import { test } from "node:test";
import { connection, finish, jobUrl, signIn } from "./support/browser.js";
import { PASSWORD } from "./support/grpc.js";
import { story } from "./support/story.js";
import { openAsProvider, withPage, world } from "./support/world.js";

const NOT_VALID = "This link is not valid";

test(
  "a provider makes a link, a stranger opens it in a fresh profile, and the provider ends it",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer, { name: "Shared" });
    await world.provider.append(job, ...story(3));
    await openAsProvider(page, job);
    await page.getByRole("button", { name: "Share" }).click();
    await page.getByText("There is none yet.").waitFor();
    await page.getByLabel("Note, for you").fill("Ward B3");
    await page.getByLabel("Good for").selectOption({ label: "7 days" });
    await page.getByRole("button", { name: "Make a link" }).click();
    await page.locator(".secret").waitFor();
    const url = await page.locator("#secret").inputValue();
    const [, secret] = url.match(/\?token=(mpw_\w+)$/);
    assert.ok(url.startsWith(`${world.server.origin}/#/jobs/${job.id}?token=`));
    const { watchToken } = await world.server.grpc.call("AuthService", "GetCurrentUser", {}, secret);
    assert.equal(watchToken.expiresAt.seconds - watchToken.createdAt.seconds, 7 * 86400);

    const stranger = await world.browser.page();
    const sent = [];
    stranger.on("request", request => sent.push(request.url()));
    await stranger.goto(url);
    await connection(stranger, "live");
    assert.match(await stranger.locator("#meta").innerText(), /Link good until/);
    assert.ok(!sent.some(url => url.includes(secret)), "the token is in no address that is sent");
    for (const unseen of ["#share", "#nav", "#out"]) assert.ok(!(await stranger.locator(unseen).isVisible()), unseen);

    await page.getByRole("button", { name: /^End the link mpw_/ }).click();
    await page.getByText(/ended .*/).waitFor();
    await stranger.getByText("Your link has ended").waitFor();
    assert.equal(await stranger.locator("#percent").textContent(), "13", "what was read stays");
    await stranger.reload();
    await stranger.getByText(NOT_VALID).waitFor();
    await finish(stranger);
  }),
);

test(
  "a link that expires while it is open says so",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer, { name: "Short" });
    const { secret } = await world.provider.share(job, 8);
    await page.goto(jobUrl(world.server.origin, job, secret));
    await connection(page, "live");
    await page.getByText("Your link has ended").waitFor();
    await connection(page, "ended");
    await page.goto("about:blank");
    await page.goto(jobUrl(world.server.origin, job, secret));
    await page.getByText(NOT_VALID).waitFor();
  }),
);

test(
  "a link shows its own job and nothing else",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer, { name: "Mine" }),
      other = await world.provider.createJob(world.customer, { name: "Not mine" });
    const { secret } = await world.provider.share(job, 3600);
    await page.goto(jobUrl(world.server.origin, other, secret));
    await page.getByText(NOT_VALID).waitFor();
    await page.goto(jobUrl(world.server.origin, job, `${secret.slice(0, -1)}0`));
    await page.getByText(NOT_VALID).waitFor();
    // The token opens nothing by the API either.
    const codes = await page.evaluate(async secret => {
      const call = (method, body) =>
        fetch(`/milepost.v1.${method}`, {
          method: "POST",
          headers: { "content-type": "application/json", authorization: `Bearer ${secret}` },
          body: JSON.stringify(body),
        }).then(response => response.json());
      const methods = { "JobService/ListJobs": {}, "AuthService/ListApiKeys": {}, "AuthService/GetUsage": {} };
      return Promise.all(Object.entries(methods).map(async ([method, body]) => (await call(method, body)).code));
    }, secret);
    assert.deepEqual(codes, ["permission_denied", "permission_denied", "permission_denied"]);
  }),
);

test(
  "the token of a link wins over the session of the tab, and leaves it alone",
  withPage(async page => {
    const outsider = await world.server.grpc.signUp("customer");
    const job = await world.provider.createJob(world.customer, { name: "By link" }),
      { secret } = await world.provider.share(job, 3600);
    await signIn(page, world.server.origin, outsider, PASSWORD);
    await page.goto(`${world.server.origin}/#/jobs/${job.id}`);
    await page.getByText("No such job").waitFor();
    await page.goto(jobUrl(world.server.origin, job, secret));
    await page.locator("#percent").waitFor();
    assert.ok(!(await page.locator("#nav").isVisible()));
    await page.goto(`${world.server.origin}/#/jobs`);
    await page.getByText("No jobs yet").waitFor();
  }),
);
