// What the page may load and what may show it: its policy, its size, and where its requests go.

import assert from "node:assert/strict";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { once } from "node:events";
import path from "node:path";
import { test } from "node:test";
import { connection, finish, jobUrl } from "./support/browser.js";
import { ROOT, Server } from "./support/server.js";
import { STEPS, story } from "./support/story.js";
import { withPage, world } from "./support/world.js";

const WEB = path.join(ROOT, "web");
const MOST_BYTES = 132_000;
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml" };

test("the page is below 132 kB in all", () => {
  const bytes = readdirSync(WEB).reduce((sum, name) => sum + statSync(path.join(WEB, name)).size, 0);
  assert.ok(bytes < MOST_BYTES, `${bytes} bytes`);
});

test("the document has a strict policy, and every file its type", async () => {
  const { headers } = await fetch(`${world.server.origin}/`);
  const policy = Object.fromEntries(
    headers
      .get("content-security-policy")
      .split(";")
      .map(each => each.trim().split(/ (.*)/s).slice(0, 2)),
  );
  assert.equal(policy["default-src"], "'none'");
  for (const each of ["script-src", "style-src", "connect-src", "img-src"]) assert.equal(policy[each], "'self'", each);
  for (const each of ["frame-ancestors", "base-uri", "form-action"]) assert.equal(policy[each], "'none'", each);
  assert.equal(headers.get("referrer-policy"), "no-referrer");
  assert.equal(headers.get("cache-control"), "no-store");
  for (const name of readdirSync(WEB)) {
    if (name === "index.html") continue;
    const response = await fetch(`${world.server.origin}/${name}`);
    assert.ok(response.headers.get("content-type").startsWith(TYPES[path.extname(name)]), name);
    assert.equal(response.headers.get("x-content-type-options"), "nosniff", name);
    assert.equal(await response.text(), readFileSync(path.join(WEB, name), "utf8"), name);
  }
});

test(
  "nothing is asked of any other origin",
  withPage(async page => {
    const job = await world.provider.createJob(world.customer),
      { secret } = await world.provider.share(job, 3600),
      origins = new Set();
    page.on("request", request => origins.add(new URL(request.url()).origin));
    await world.provider.append(job, ...story(STEPS.length));
    await page.goto(jobUrl(world.server.origin, job, secret));
    await connection(page, "complete");
    assert.deepEqual([...origins], [world.server.origin]);
  }),
);

test("a portal shows the page in a frame only where the operator named it", async t => {
  let framed = "";
  const portal = createServer((_, response) =>
    response
      .setHeader("content-type", "text/html")
      .end(`<!doctype html><title>Portal</title><iframe title=Job src="${framed}"></iframe>`),
  ).listen(0, "127.0.0.1");
  await once(portal, "listening");
  const portalOrigin = `http://127.0.0.1:${portal.address().port}`;
  t.after(() => portal.close());
  const allowing = await Server.start(["--frame-ancestors", portalOrigin]);
  t.after(() => allowing.stop());
  for (const [server, shown] of [
    [world.server, false],
    [allowing, true],
  ]) {
    const provider = await server.grpc.signUp("provider"),
      customer = await server.grpc.signUp("customer");
    await provider.register(STEPS);
    const job = await provider.createJob(customer),
      { secret } = await provider.share(job, 3600);
    await provider.append(job, ...story(3));
    framed = jobUrl(server.origin, job, secret).replace("/#", "/?embed#");
    const page = await world.browser.page();
    await page.goto(portalOrigin);
    if (shown) await page.frameLocator("iframe").locator("#percent:text-is('13')").waitFor();
    else await page.waitForFunction(() => window.frames.length === 1);
    const frame = page.frames()[1];
    assert.equal(await frame.locator("#percent").count(), shown ? 1 : 0);
    if (!shown) page.faults = page.faults.filter(fault => !fault.includes("frame-ancestors"));
    await finish(page);
  }
});
