// Markup and script in every text that a tenant can set: the page shows them as text.

import assert from "node:assert/strict";
import { test } from "node:test";
import { connection, jobUrl, signIn } from "./support/browser.js";
import { PASSWORD } from "./support/grpc.js";
import { withPage, world } from "./support/world.js";

let count = 0;
/** A text that would run script if it became markup, in an attribute or in a script too. */
const hostile = field =>
  `${field}${++count}"'><img src=x onerror="window.hit='${field}'"><script>window.hit='${field}'</script>`;

test(
  "script and markup in a tenant's texts are text",
  withPage(async page => {
    const { grpc, origin } = world.server;
    const names = () => ({ firstName: hostile("first"), lastName: hostile("last") });
    const email = `a<b>"'&${Math.floor(Math.random() * 1e9)}<img/src=x/onerror=window.hit=1>@example.com`;
    const provider = await grpc.signUp("provider", { ...names(), email }),
      customer = await grpc.signUp("customer", names());
    const tag = hostile("tag"),
      name = hostile("configuration");
    const step = {
      tag: hostile("step-tag"),
      name: hostile("step"),
      points: 3,
      metadata: [{ name: hostile("declared"), kind: "METADATA_KIND_NUMBER", units: hostile("units") }],
    };
    await provider.register([step, { tag: "b", name: hostile("step"), points: 1 }], { tag, name, version: "1.0.0" });
    const job = await provider.createJob(customer, { tag, id: hostile("id"), name: hostile("job") });
    const metadata = {
      [step.metadata[0].name]: 1,
      [hostile("name")]: hostile("value"),
      link: "javascript:window.hit='link'",
      data: "data:text/html,<script>window.hit=1</script>",
      page: `https://example.com/"><script>window.hit='url'</script>`,
    };
    await provider.append(
      job,
      { kind: "info", name: hostile("note") },
      { kind: "progress", name: hostile("report"), stepTag: step.tag, stepPercent: 30 },
      { kind: "error", name: hostile("error"), stepTag: step.tag, metadata },
      { kind: "step", name: hostile("done"), stepTag: step.tag, metadata },
    );
    const { secret } = await provider.call("AuthService", "CreateWatchToken", {
      jobId: job.id,
      note: hostile("token"),
      lifetime: { seconds: 3600 },
    });
    await provider.call("AuthService", "CreateApiKey", { note: hostile("key") });

    const check = async (where, ...texts) => {
      for (const text of texts)
        assert.ok((await page.locator("body").textContent()).includes(text), `${where} shows ${text}`);
      const found = await page.evaluate(() => ({
        hit: window.hit,
        made: document.querySelectorAll("main img, main script, dialog img, dialog script").length,
        links: [...document.querySelectorAll("a[href]")].map(a => a.protocol),
      }));
      assert.equal(found.hit, undefined, where);
      assert.equal(found.made, 0, where);
      assert.ok(
        found.links.every(protocol => /^https?:$/.test(protocol)),
        `${where}: ${found.links}`,
      );
    };

    await signIn(page, origin, provider, PASSWORD);
    await page.locator("#jobs > tr").waitFor();
    await check(
      "the list",
      job.providerJobName,
      job.providerJobId,
      name,
      `${customer.user.firstName} ${customer.user.lastName}`,
    );
    await page.goto(`${origin}/#/keys`);
    await page.locator("[data-key]").waitFor();
    await check("the keys", "key");
    await page.goto(`${origin}/#/profile`);
    await page.getByText("Signed in until").waitFor();
    await check("the profile", email);
    await page.goto(`${origin}/#/jobs/${job.id}`);
    await page.locator("#percent").waitFor();
    await connection(page, "live");
    await page.locator("#events > li").nth(3).waitFor();
    await check(
      "the job",
      job.providerJobName,
      job.providerJobId,
      step.name,
      ...Object.keys(metadata),
      metadata.link,
      metadata.data,
      step.metadata[0].units,
    );
    await page.getByRole("button", { name: "Share" }).click();
    await page.locator("#links li").waitFor();
    await check("the links", "token");
    await page.keyboard.press("Escape");
    await provider.append(job, { kind: "error", name: hostile("failed") });
    await page.locator(".plate").waitFor();
    await check("a failed job", "failed");
    await provider.call("JobService", "CloseJob", { jobId: job.id, reason: hostile("reason") });
    await connection(page, "complete");
    await check("a closed job", "reason");
    // The addresses are the reader's, and may be anybody's: what stands in them is text, too.
    await page.goto(
      jobUrl(origin, { id: encodeURIComponent("<img src=x onerror=window.hit=1>") }, `${secret}<script>`),
    );
    await page.getByText("This link is not valid").waitFor();
    await check("a broken link");
    await page.goto(
      `${origin}/#/jobs?text=${encodeURIComponent(hostile("filter"))}&who=${encodeURIComponent(hostile("who"))}&status=x`,
    );
    await page.locator("#filters").waitFor();
    await check("the filters");
  }),
);
