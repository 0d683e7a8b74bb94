// A proxy that holds streams back, as nginx does unless it is told otherwise.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { test } from "node:test";
import { connection, finish, jobUrl } from "./support/browser.js";
import { assertShowsAll, noteRows, waitForCount } from "./support/dom.js";
import { end, freePort } from "./support/server.js";
import { story } from "./support/story.js";
import { world } from "./support/world.js";

class Nginx {
  static async start(upstream) {
    const nginx = new Nginx();
    nginx.directory = mkdtempSync("/tmp/milepost-nginx-");
    chmodSync(nginx.directory, 0o755);
    nginx.port = await freePort();
    nginx.upstream = upstream;
    nginx.write(true);
    nginx.process = spawn("nginx", ["-p", nginx.directory, "-c", path.join(nginx.directory, "nginx.conf")], {
      stdio: "inherit",
      env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` },
    });
    while (
      !(await fetch(nginx.origin).then(
        response => response.ok,
        () => false,
      ))
    ) {
      assert.equal(nginx.process.exitCode, null, "nginx ended");
      await new Promise(resolve => setTimeout(resolve, 50));
    }
    return nginx;
  }

  get origin() {
    return `http://127.0.0.1:${this.port}`;
  }

  write(buffering) {
    // By default nginx asks its servers by HTTP/1.0 and buffers: it passes on what fills a buffer.
    const streams = buffering
      ? "proxy_http_version 1.0; proxy_buffering on;"
      : "proxy_http_version 1.1; proxy_buffering off;";
    const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
      .map(each => `${each}_temp_path ${this.directory}/${each};`)
      .join(" ");
    writeFileSync(
      path.join(this.directory, "nginx.conf"),
      `
      daemon off; pid nginx.pid; error_log error.log; events {}
      http {
        access_log off; ${temporary}
        server {
          listen 127.0.0.1:${this.port};
          location / { proxy_pass ${this.upstream}; proxy_set_header host $host:$server_port; ${streams} proxy_read_timeout 1h; }
        }
      }`,
    );
  }

  reload(buffering) {
    this.write(buffering);
    this.process.kill("SIGHUP");
  }

  async stop() {
    await end(this.process);
    rmSync(this.directory, { recursive: true, force: true });
  }
}

test("behind a proxy that buffers streams the page reads by pages and says so, until the stream works", async t => {
  const nginx = await Nginx.start(world.server.origin),
    page = await world.browser.page();
  t.after(() => nginx.stop());
  const job = await world.provider.createJob(world.customer),
    { secret } = await world.provider.share(job, 3600);
  await world.provider.append(job, ...story(2));
  await page.goto(jobUrl(nginx.origin, job, secret));
  await connection(page, "paged");
  assert.match(await page.locator("#connection").innerText(), /Reading by pages/);
  await waitForCount(page, 2);
  await noteRows(page);
  const reads = [];
  page.on("request", request => {
    if (request.url().endsWith("ListEvents")) reads.push(Date.now());
  });
  await world.provider.append(job, ...story(4).slice(2));
  await waitForCount(page, 4);
  // Also while a stream is tried in vain, which takes 5 s every now and then.
  await page.waitForRequest(request => request.url().endsWith("WatchEvents"));
  await world.provider.append(job, { kind: "info", name: "during a trial" });
  await waitForCount(page, 5);
  assert.ok(reads.length >= 2);
  nginx.reload(false);
  await connection(page, "live");
  await world.provider.append(job, { kind: "complete" });
  await connection(page, "complete");
  await assertShowsAll(page, await world.provider.listEvents(job));
  assert.deepEqual(await page.evaluate(() => window.added), [3, 4, 5, 6]);
  await finish(page);
});
