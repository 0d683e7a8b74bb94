// What all tests share: one server with its users, and one browser.

import { after, before } from "node:test";
import { Browser, finish, signIn } from "./browser.js";
import { PASSWORD } from "./grpc.js";
import { Server } from "./server.js";
import { STEPS } from "./story.js";

export const world = {};

before(async () => {
  world.server = await Server.start();
  world.browser = await Browser.start();
  world.customer = await world.server.grpc.signUp("customer");
  world.provider = await world.server.grpc.signUp("provider");
  await world.provider.register(STEPS);
});

after(async () => {
  await world.browser?.close();
  await world.server?.stop();
});

/** Runs a test with a page in a fresh profile, which must end without a fault. */
export const withPage = (act, options) => async () => {
  const page = await world.browser.page(options);
  await act(page);
  await finish(page);
};

/** Opens a job as its provider sees it. */
export const openAsProvider = (page, job) => openAs(page, world.provider, job);

/** Opens a job as a user sees it. */
export async function openAs(page, user, job) {
  await signIn(page, world.server.origin, user, PASSWORD);
  await page.goto(`${world.server.origin}/#/jobs/${job.id}`);
  await page.locator("#percent").waitFor();
}
