// Accounts: sign-up, sign-in, sign-out, pasted credentials, keys and the profile.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { test } from "node:test";
import { signIn } from "./support/browser.js";
import { PASSWORD } from "./support/grpc.js";
import { withPage, world } from "./support/world.js";

const isValid = secret =>
  world.server.grpc.call("AuthService", "GetCurrentUser", {}, secret).then(
    () => true,
    () => false,
  );
const storedSecret = page => page.evaluate(() => sessionStorage.getItem("milepost.secret"));

test(
  "a person signs up, makes an API key, and the key works by gRPC until it is ended",
  withPage(async page => {
    await page.goto(`${world.server.origin}/#/sign-up`);
    await page.getByLabel(/provider/).check();
    await page.getByLabel("E-mail").fill(`page-${randomUUID()}@example.com`);
    await page.getByLabel("Password, 8 to 71 bytes").fill("short");
    await page.getByRole("button", { name: "Sign up" }).click();
    await page.locator("[name=password][aria-invalid=true]").waitFor();
    await page.getByLabel("Password, 8 to 71 bytes").fill(PASSWORD);
    await page.getByRole("button", { name: "Sign up" }).click();
    await page.getByText("No jobs yet").waitFor();

    await page.getByRole("link", { name: "API keys" }).click();
    await page.getByText("There is none yet.").waitFor();
    await page.getByLabel("Note, for you").fill("pipeline");
    await page.getByRole("button", { name: "Make a key" }).click();
    await page.locator("[data-key]").waitFor();
    const secret = await page.locator("#secret").inputValue();
    assert.match(secret, /^mpk_/);
    const { apiKey, user } = await world.server.grpc.call("AuthService", "GetCurrentUser", {}, secret);
    assert.deepEqual(
      [apiKey.note, apiKey.scopes, user.role],
      ["pipeline", ["API_KEY_SCOPE_READ"], "USER_ROLE_PROVIDER"],
    );

    await page.getByRole("button", { name: /^Rotate/ }).click();
    await page.locator("[data-key]").nth(1).waitFor();
    const second = await page.locator("#secret").inputValue();
    assert.notEqual(second, secret);
    assert.ok(await isValid(second));

    await page.getByRole("button", { name: /^End/ }).nth(1).click();
    await page.getByText("(ended)").waitFor();
    assert.ok(!(await isValid(second)));
    assert.ok(await isValid(secret), "the old key is valid for an hour after the rotation");
  }),
);

test(
  "a refused sign-in says so beside the form and does not tell why",
  withPage(async page => {
    await page.goto(`${world.server.origin}/`);
    for (const [email, password] of [
      [world.customer.email, "wrong horse"],
      ["nobody@example.com", PASSWORD],
    ]) {
      await page.getByLabel("E-mail").fill(email);
      await page.getByLabel("Password", { exact: true }).fill(password);
      await page.getByRole("button", { name: "Sign in", exact: true }).click();
      await page.locator("#sign-in-f button:enabled").waitFor();
      await page.getByRole("alert").filter({ hasText: "e-mail" }).waitFor();
    }
    assert.equal(await storedSecret(page), null);
  }),
);

test(
  "the secret of a session is in the tab's session storage alone, and signing out ends it",
  withPage(async page => {
    await signIn(page, world.server.origin, world.customer, PASSWORD);
    const secret = await storedSecret(page);
    assert.match(secret, /^mps_/);
    assert.ok(!JSON.stringify(await page.context().storageState()).includes(secret));
    assert.ok(!page.url().includes(secret));
    assert.ok(await isValid(secret));
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByRole("heading", { name: "Sign in" }).waitFor();
    assert.equal(await storedSecret(page), null);
    assert.ok(!(await isValid(secret)));
  }),
);

test(
  "a session that ends elsewhere leads to the sign-in, and on to where the reader was",
  withPage(async page => {
    const user = await world.server.grpc.signUp("customer");
    await signIn(page, world.server.origin, user, PASSWORD);
    await page.locator("#connection[data-s=live]").waitFor();
    await world.server.grpc.call("AuthService", "LogOut", {}, await storedSecret(page));
    await page.getByText("You are signed out").waitFor();
    await page.getByLabel("E-mail").fill(user.email);
    await page.getByLabel("Password", { exact: true }).fill(PASSWORD);
    await page.getByRole("button", { name: "Sign in", exact: true }).click();
    await page.locator("#connection[data-s=live]").waitFor();
    // On the page of a job what was read stays, and a button leads to the sign-in and back.
    const job = await world.provider.createJob(user);
    await page.goto(`${world.server.origin}/#/jobs/${job.id}`);
    await page.locator("#connection[data-s=live]").waitFor();
    await world.server.grpc.call("AuthService", "LogOut", {}, await storedSecret(page));
    await page.locator("#connection[data-s=ended]").waitFor();
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByText("You are signed out").waitFor();
    await page.getByLabel("E-mail").fill(user.email);
    await page.getByLabel("Password", { exact: true }).fill(PASSWORD);
    await page.getByRole("button", { name: "Sign in", exact: true }).click();
    await page.locator("#percent").waitFor();
  }),
);

test(
  "a pasted key signs in, and a pasted watch token opens its job",
  withPage(async page => {
    const { secret: key } = await world.customer.call("AuthService", "CreateApiKey", { note: "pasted" });
    const job = await world.provider.createJob(world.customer),
      { secret: token } = await world.provider.share(job, 3600);
    const paste = async text => {
      await page.getByLabel("API key, session or watch token").fill(text);
      await page.getByRole("button", { name: "Use it" }).click();
    };
    await page.goto(`${world.server.origin}/`);
    await paste("mpk_nothing");
    await page.getByText("This key or token is not valid").waitFor();
    await paste(` ${token}\n`);
    await page.locator("#percent").waitFor();
    assert.ok(page.url().includes(`#/jobs/${job.id}?token=${token}`));
    assert.equal(await storedSecret(page), null);
    await page.goto(`${world.server.origin}/#/jobs`);
    await paste(key);
    await page.locator("#connection[data-s=live]").waitFor();
    // A key cannot manage keys or change the account unless it may.
    await page.getByRole("link", { name: "API keys" }).click();
    await page.getByText("This key may not manage keys.").waitFor();
    await page.getByRole("link", { name: "Profile" }).click();
    await page.getByText("Only a session changes these").waitFor();
    // Signing out forgets the key, which stays valid.
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByRole("heading", { name: "Sign in" }).waitFor();
    assert.ok(await isValid(key));
  }),
);

test(
  "the profile of a customer shows the customer code, which a button replaces",
  withPage(async page => {
    const user = await world.server.grpc.signUp("customer");
    await signIn(page, world.server.origin, user, PASSWORD);
    const code = async () => (await user.call("AuthService", "GetCurrentUser", {})).user.customerCode;
    const shown = async () => (await page.locator("#code").textContent()).replace("-", "");
    const first = await code();
    await page.getByRole("link", { name: "Profile" }).click();
    await page.getByText(`${first.slice(0, 5)}-${first.slice(5)}`).waitFor();
    await page.getByRole("button", { name: "New code" }).click();
    await page.getByText("The old code works no more.").waitFor();
    assert.notEqual(await shown(), first);
    assert.equal(await shown(), await code());
    // A provider has no code.
    await page.getByRole("button", { name: "Sign out" }).click();
    await signIn(page, world.server.origin, world.provider, PASSWORD);
    await page.getByRole("link", { name: "Profile" }).click();
    await page.getByText(world.provider.email).waitFor();
    assert.ok(!(await page.locator("#code-f").isVisible()));
  }),
);

test(
  "the profile changes the names and the password",
  withPage(async page => {
    const user = await world.server.grpc.signUp("customer");
    await signIn(page, world.server.origin, user, PASSWORD);
    await page.getByRole("link", { name: "Profile" }).click();
    await page.getByText(user.email).waitFor();
    await page.getByLabel("First name").fill("Grace");
    await page.getByRole("button", { name: "Save the names" }).click();
    await page.getByText("Saved: Grace Okafor.").waitFor();
    await page.getByLabel("Current password").fill("wrong horse");
    await page.getByLabel("New password").fill("another horse battery");
    await page.getByRole("button", { name: "Change the password" }).click();
    await page.locator("[name=current_password][aria-invalid=true]").waitFor();
    await page.getByLabel("Current password").fill(PASSWORD);
    await page.getByRole("button", { name: "Change the password" }).click();
    // The session that the user signed up with is another one.
    await page.getByText("Other sessions ended: 1.").waitFor();
    assert.ok(!(await isValid(user.secret)));
  }),
);
