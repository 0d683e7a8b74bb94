// The library in Debian's chromium, in a page of another origin than the server's.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import path from "node:path";
import { chromium } from "playwright-core";
import { pagePort, server, startProxy, test, world } from "./world.js";

const ROOT = path.join(import.meta.dirname, "../..");

/** An import map for what the library and the page import, by the `exports` of the packages. */
async function importMap(): Promise<string> {
  const imports: Record<string, string> = { "@milepost/client": "/dist/index.js" };
  for (const name of ["@bufbuild/protobuf", "@connectrpc/connect", "@connectrpc/connect-web"]) {
    const file = await readFile(path.join(ROOT, "node_modules", name, "package.json"), "utf8");
    const { exports } = JSON.parse(file) as { exports: Record<string, { import: string }> };
    for (const [entry, { import: target }] of Object.entries(exports)) {
      imports[name + entry.slice(1)] = path.join("/node_modules", name, target);
    }
  }
  return JSON.stringify({ imports });
}

/** Publishes and watches a job, and writes what it sees into `window`. */
const SCRIPT = `
import { createConnectTransport } from "@connectrpc/connect-web";
import { EventKind, Publisher, watch, withCredential } from "@milepost/client";

const { baseUrl, secret, jobId } = Object.fromEntries(new URLSearchParams(location.search));
const transport = createConnectTransport({ baseUrl, interceptors: [withCredential(secret)] });
Object.assign(window, { names: [], interruptions: 0 });
const onInterruption = () => void window.interruptions++;
const publisher = new Publisher(transport, { onInterruption });
window.append = (name) => publisher.append({ jobId }, { kind: EventKind.INFO, name });
window.complete = async () => {
  await publisher.append({ jobId }, { kind: EventKind.COMPLETE });
  await publisher.close();
};
const events = watch(transport, { jobId, onInterruption });
for await (const { name } of events) window.names.push(name);
window.last = Number(events.end.lastSequence);
`;
const htmlWith = (imports: string) => `<!doctype html>
<link rel="icon" href="data:,">
<script type="importmap">${imports}</script>
<script type="module">${SCRIPT}</script>`;

test("a page publishes and watches in chromium, while connections break and the server is killed", async (t) => {
  const proxy = await startProxy(t);
  const html = htmlWith(await importMap());
  const pages = createServer(async ({ url = "/" }, response) => {
    const { pathname } = new URL(url, "http://localhost");
    const isPage = pathname === "/";
    response.setHeader("content-type", isPage ? "text/html" : "text/javascript");
    response.end(isPage ? html : await readFile(path.join(ROOT, pathname)));
  }).listen(pagePort, "127.0.0.1");
  t.after(() => pages.close());
  const executablePath = process.env["CHROMIUM"] ?? "/usr/bin/chromium";
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", "--disable-quic"] });
  t.after(() => browser.close());
  const page = await browser.newPage();
  page.setDefaultTimeout(0);
  const faults: string[] = [];
  const broken = new Promise<never>((_, reject) => page.on("pageerror", reject));
  page.on("console", (message) => {
    if (message.type() === "error" && !/Failed to load resource/.test(message.text())) faults.push(message.text());
  });

  const job = await world.createJob();
  const query = new URLSearchParams({ baseUrl: proxy.origin, secret: world.secret, ...job });
  await page.goto(`http://127.0.0.1:${pagePort}/?${query}`);
  const until = (condition: string) => Promise.race([page.waitForFunction(condition), broken]);
  await until("window.append");
  const append = async (name: string) => {
    await page.evaluate(`append(${JSON.stringify(name)})`);
    await until(`names.at(-1) === ${JSON.stringify(name)}`);
  };
  await append("a");
  proxy.cut();
  await append("b");
  await server.end("SIGKILL");
  const after = append("c");
  await server.start();
  await after;
  await page.evaluate("complete()");
  await until("window.last === 4");
  assert.deepEqual(await page.evaluate("names"), ["a", "b", "c", ""]);
  assert.ok(Number(await page.evaluate("interruptions")) >= 2);
  assert.deepEqual(faults, []);
});
