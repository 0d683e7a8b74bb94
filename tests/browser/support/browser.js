// Debian's chromium, and pages that fail their test for an error or a violation of the policy.

import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const EXECUTABLE = process.env.CHROMIUM ?? "/usr/bin/chromium";
const WAIT_MS = Number(process.env.MILEPOST_BROWSER_WAIT_MS ?? 60_000);
const ARGUMENTS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
// A browser tells of each connection that is refused; the tests refuse some.
const EXPECTED = /Failed to load resource/;

export class Browser {
  static async start() {
    const browser = new Browser();
    browser.chromium = await chromium.launch({ executablePath: EXECUTABLE, headless: true, args: ARGUMENTS });
    return browser;
  }

  /** A page in a fresh profile. What it must not do is in `page.faults`. */
  async page(options = {}) {
    const context = await this.chromium.newContext({
      viewport: { width: 1440, height: 1000 },
      locale: "en-GB",
      ...options,
    });
    context.setDefaultTimeout(WAIT_MS);
    const page = await context.newPage();
    page.faults = [];
    page.on("pageerror", error => page.faults.push(`error: ${error.stack}`));
    page.on("console", message => {
      if (["error", "warning"].includes(message.type()) && !EXPECTED.test(message.text()))
        page.faults.push(`console: ${message.text()}`);
    });
    page.on("dialog", dialog => {
      page.faults.push(`dialog: ${dialog.message()}`);
      dialog.dismiss();
    });
    await page.addInitScript(() => {
      window.violations = [];
      document.addEventListener("securitypolicyviolation", event =>
        window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`),
      );
    });
    return page;
  }

  async close() {
    await this.chromium.close();
  }
}

/** Closes a page after it showed no fault. */
export async function finish(page) {
  const violations = await page.evaluate(() => window.violations);
  await page.context().close();
  assert.deepEqual([...page.faults, ...violations], []);
}

/** Signs a user in by the form of the page. */
export async function signIn(page, origin, user, password) {
  await page.goto(`${origin}/`);
  await page.getByLabel("E-mail").fill(user.email);
  await page.getByLabel("Password", { exact: true }).fill(password);
  await page.getByRole("button", { name: "Sign in", exact: true }).click();
  await page.locator("#jobs, #empty").first().waitFor({ state: "attached" });
}

export const jobUrl = (origin, job, secret) => `${origin}/#/jobs/${job.id}?token=${secret}`;

export const connection = (page, state) => page.locator(`#connection[data-s=${state}]`).waitFor();
