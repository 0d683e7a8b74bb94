// Makes the pictures of docs/page: `tests/browser/screenshots`. The job of the pictures is played in real time.

import { mkdirSync } from "node:fs";
import path from "node:path";
import { Browser, connection, finish, jobUrl, signIn } from "./support/browser.js";
import { PASSWORD } from "./support/grpc.js";
import { ROOT, Server } from "./support/server.js";
import { STEPS, story } from "./support/story.js";

const OUT = path.join(ROOT, "docs/page");
const EVENT_MS = 1500;

const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));

async function play(provider, job, events) {
  for (const event of events) {
    await sleep(EVENT_MS);
    await provider.append(job, event);
  }
}

/** The story with reports of each step, as a provider that tells more of its steps sends it. */
const told = (steps, options) =>
  story(steps, options).flatMap(event =>
    event.kind === "step"
      ? [...[0, 58].map(stepPercent => ({ kind: "progress", stepTag: event.stepTag, stepPercent })), event]
      : [event],
  );

async function shot(page, name) {
  // The beat of the live mark and the moving fills stand still.
  await page.screenshot({ path: path.join(OUT, `${name}.png`), animations: "disabled" });
}

async function main() {
  mkdirSync(OUT, { recursive: true });
  const server = await Server.start(),
    browser = await Browser.start();
  const provider = await server.grpc.signUp("provider"),
    customer = await server.grpc.signUp("customer");
  await provider.register(STEPS);
  const name = "CT chest, follow-up after 12 months";
  const job = await provider.createJob(customer, { id: "2026-11-26/ct-004711", name }),
    { secret } = await provider.share(job, 86_400);
  const options = { viewport: { width: 1340, height: 820 }, reducedMotion: "reduce" };
  const light = await browser.page(options),
    dark = await browser.page({ ...options, colorScheme: "dark" }),
    phone = await browser.page({ viewport: { width: 360, height: 780 }, reducedMotion: "reduce" });
  const list = await browser.page(options);
  await signIn(list, server.origin, customer, PASSWORD);
  for (const page of [light, dark, phone]) {
    await page.goto(jobUrl(server.origin, job, secret));
    await connection(page, "live");
  }
  const events = told(STEPS.length, { trouble: true }),
    // Up to the last report of a step: it is under way in the picture.
    at = tag => events.findIndex(event => event.kind === "step" && event.stepTag === tag);
  await play(provider, job, events.slice(0, at("s4")));
  await shot(light, "running");
  await play(provider, job, events.slice(at("s4"), at("s6")));
  await shot(light, "recovered");
  await play(provider, job, events.slice(at("s6"), at("s8")));
  await shot(dark, "dark");
  await shot(phone, "phone");
  await play(provider, job, events.slice(at("s8")));
  await connection(light, "complete");
  await shot(light, "complete");
  for (const [id, count] of [
    ["ct-004712", 9],
    ["ct-004713", 3],
    ["ct-004714", 0],
  ]) {
    const labels = { ward: count ? "3b" : "4a", scanner: "ct-2" },
      other = await provider.createJob(customer, { id, name: `CT chest ${id.slice(-4)}`, labels });
    if (count) await provider.append(other, ...story(count));
    if (id === "ct-004713") await provider.append(other, { kind: "error", name: "Out of GPU memory", stepTag: "s4" });
  }
  await list.reload();
  await list.locator("#jobs > tr").nth(3).waitFor();
  await list.locator("#plot rect").first().waitFor();
  await shot(list, "jobs");
  for (const page of [light, dark, phone, list]) await finish(page);
  await browser.close();
  await server.stop();
}

await main();
