// A milepost server with a database of its own, its users and jobs, and a proxy that breaks connections.

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { chmodSync, mkdtempSync, rmSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Server as TcpServer, type Socket } from "node:net";
import path from "node:path";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import { createClient, type Transport } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import {
  ApiKeyScope,
  AuthService,
  ConfigurationService,
  type Event,
  EventKind,
  EventService,
  JobService,
  UserRole,
  withCredential,
} from "@milepost/client";

const PASSWORD = "correct horse battery";

/** The only step of the jobs. */
export const STEP = "scan";

const BINARY = process.env["MILEPOST_BIN"];
assert.ok(BINARY, "MILEPOST_BIN is not set: it names the server's binary");

export class Server {
  readonly directory = mkdtempSync("/tmp/milepost-typescript-");
  readonly port: number;
  readonly origin: string;
  readonly #options: string[];
  #process: ChildProcess | undefined;

  constructor(port: number, options: string[]) {
    // The embedded Postgres runs as another user, where the tests run as root.
    chmodSync(this.directory, 0o755);
    this.port = port;
    this.origin = `http://127.0.0.1:${port}`;
    this.#options = options;
  }

  async start(): Promise<void> {
    const data = path.join(this.directory, "data");
    const options = ["--listen", `127.0.0.1:${this.port}`, "--data-dir", data, "--bcrypt-cost", "4"];
    this.#process = spawn(BINARY as string, ["serve", ...options, ...this.#options], {
      stdio: process.env["MILEPOST_VERBOSE"] ? "inherit" : "ignore",
    });
    while (!(await fetch(this.origin).catch(() => undefined))?.ok) await sleep(50);
  }

  async end(signal: NodeJS.Signals): Promise<void> {
    if (!this.#process || this.#process.exitCode !== null) return;
    this.#process.kill(signal);
    await once(this.#process, "exit");
  }

  async stop(): Promise<void> {
    await this.end("SIGTERM");
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** A provider and a customer, and what the provider does beside the tested library. */
export class World {
  readonly #transport: Transport;
  readonly #customer: Transport;
  readonly #customerId: string;
  readonly secret: string;

  private constructor(transport: Transport, customer: Transport, customerId: string, secret: string) {
    this.#transport = transport;
    this.#customer = customer;
    this.#customerId = customerId;
    this.secret = secret;
  }

  static async create(origin: string): Promise<World> {
    const anonymous = createClient(AuthService, createConnectTransport({ baseUrl: origin, httpVersion: "2" }));
    const signUp = (role: UserRole, email: string) => anonymous.signUp({ role, email, password: PASSWORD });
    const { user, session: customers } = await signUp(UserRole.CUSTOMER, "customer@example.com");
    const { session } = await signUp(UserRole.PROVIDER, "provider@example.com");
    assert.ok(user && customers && session);
    const customer = connectTo(origin, customers.secret);
    const world = new World(connectTo(origin, session.secret), customer, user.id, session.secret);
    const configurations = createClient(ConfigurationService, world.#transport);
    const steps = [{ tag: STEP, name: "Scan", points: 1n }];
    await configurations.registerJobConfiguration({ tag: "ct", name: "CT", version: "1.0.0", steps });
    return world;
  }

  get auth() {
    return createClient(AuthService, this.#transport);
  }

  get #events() {
    return createClient(EventService, this.#transport);
  }

  async createKey() {
    const scopes = [ApiKeyScope.READ, ApiKeyScope.APPEND];
    const { apiKey, secret } = await this.auth.createApiKey({ scopes });
    assert.ok(apiKey);
    return { id: apiKey.id, secret };
  }

  async createJob(providerJobId: string = crypto.randomUUID()): Promise<{ jobId: string }> {
    const { job } = await createClient(JobService, this.#transport).createJob({
      providerJobId,
      customer: { case: "customerId", value: this.#customerId },
      configurationTag: "ct",
    });
    assert.ok(job);
    return { jobId: job.id };
  }

  /** Has the customer ask to stop a job, and returns when that was. */
  async requestCancellation({ jobId }: { jobId: string }): Promise<Date> {
    const { job } = await createClient(JobService, this.#customer).requestCancellation({ jobId, reason: "enough" });
    assert.ok(job?.cancellationRequestedAt);
    return timestampDate(job.cancellationRequestedAt);
  }

  async append({ jobId }: { jobId: string }, ...names: string[]): Promise<void> {
    const events = names.map((name) => ({ id: crypto.randomUUID(), kind: EventKind.INFO, name }));
    await this.#events.appendEvents({ job: { case: "jobId", value: jobId }, events });
  }

  /** Appends how far the only step is. */
  async progress({ jobId }: { jobId: string }, name: string, stepPercent: number): Promise<void> {
    const event = { id: crypto.randomUUID(), kind: EventKind.PROGRESS, name, stepTag: STEP, stepPercent };
    await this.#events.appendEvents({ job: { case: "jobId", value: jobId }, events: [event] });
  }

  async complete({ jobId }: { jobId: string }): Promise<void> {
    const event = { id: crypto.randomUUID(), kind: EventKind.COMPLETE, name: "complete" };
    await this.#events.appendEvents({ job: { case: "jobId", value: jobId }, events: [event] });
  }

  /** All events of a job, as the server lists them. */
  async list({ jobId }: { jobId: string }): Promise<Event[]> {
    const events: Event[] = [];
    for (let pageToken = ""; ;) {
      const page = await this.#events.listEvents({ job: { case: "jobId", value: jobId }, pageSize: 500, pageToken });
      events.push(...page.events);
      pageToken = page.nextPageToken;
      if (!pageToken) return events;
    }
  }
}

export const connectTo = (baseUrl: string, secret: string, httpVersion: "1.1" | "2" = "2") =>
  createConnectTransport({ baseUrl, httpVersion, interceptors: [withCredential(secret)] });

/** Forwards connections to a port. */
export class Proxy {
  readonly #server: TcpServer;
  readonly #pairs = new Set<[Socket, Socket]>();
  #stalls = false;

  private constructor(server: TcpServer) {
    this.#server = server;
  }

  static async start(port: number): Promise<Proxy> {
    const proxy: Proxy = new Proxy(createServer((client) => proxy.#forward(client, port)));
    await once(proxy.#server.listen(0, "127.0.0.1"), "listening");
    return proxy;
  }

  get origin(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  get connections(): number {
    return this.#pairs.size;
  }

  #forward(client: Socket, port: number): void {
    const server = connect(port, "127.0.0.1");
    const pair: [Socket, Socket] = [client, server];
    this.#pairs.add(pair);
    for (const [from, to] of [pair, [server, client]] as const) {
      from.on("data", (bytes) => {
        if (to.write(bytes)) return;
        from.pause();
        to.once("drain", () => this.#stalls || from.resume());
      });
      from.on("error", () => {});
      from.on("close", () => {
        to.destroy();
        this.#pairs.delete(pair);
      });
      if (this.#stalls) from.pause();
    }
  }

  /** Breaks all connections. */
  cut(): void {
    for (const [client, server] of this.#pairs) {
      client.resetAndDestroy();
      server.destroy();
    }
  }

  /** Stops or lets through the bytes of all connections, and of new ones, which stay open. */
  stall(stalls: boolean): void {
    this.#stalls = stalls;
    for (const socket of [...this.#pairs].flat()) stalls ? socket.pause() : socket.resume();
  }

  async close(): Promise<void> {
    this.cut();
    this.#server.close();
    await once(this.#server, "close");
  }
}

export const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** Waits for a condition. The test runner's timeout bounds the wait. */
export async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await sleep(10);
}

export async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}
