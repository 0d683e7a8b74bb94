// The API by gRPC, as a provider's service calls it.

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { randomUUID } from "node:crypto";
import path from "node:path";
import { ROOT } from "./server.js";

const READY_MS = 60_000;
export const PASSWORD = "correct horse battery";

export class Grpc {
  constructor(address) {
    const files = ["auth", "configurations", "jobs", "events"].map(name => `milepost/v1/${name}.proto`);
    const definition = loader.loadSync(files, {
      includeDirs: [path.join(ROOT, "proto")],
      longs: Number,
      enums: String,
      oneofs: true,
      defaults: true,
    });
    const {
      milepost: { v1 },
    } = grpc.loadPackageDefinition(definition);
    // The server is killed and started again: do not wait long to connect again.
    const options = { "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 500 };
    this.clients = Object.fromEntries(
      ["AuthService", "ConfigurationService", "JobService", "EventService"].map(name => [
        name,
        new v1[name](address, grpc.credentials.createInsecure(), options),
      ]),
    );
  }

  ready() {
    return new Promise((resolve, reject) =>
      this.clients.JobService.waitForReady(Date.now() + READY_MS, error => (error ? reject(error) : resolve())),
    );
  }

  call(service, method, message, secret) {
    const metadata = new grpc.Metadata();
    if (secret) metadata.set("authorization", `Bearer ${secret}`);
    return new Promise((resolve, reject) =>
      this.clients[service][method](message, metadata, { deadline: Date.now() + READY_MS }, (error, answer) =>
        error ? reject(error) : resolve(answer),
      ),
    );
  }

  async signUp(role, names = {}) {
    const email = `${role}-${randomUUID()}@example.com`;
    const { user, session } = await this.call("AuthService", "SignUp", {
      role: `USER_ROLE_${role.toUpperCase()}`,
      email,
      password: PASSWORD,
      firstName: role === "provider" ? "Northlight" : "Amara",
      lastName: role === "provider" ? "Imaging" : "Okafor",
      ...names,
    });
    return new User(this, user, session.secret);
  }

  close() {
    for (const client of Object.values(this.clients)) client.close();
  }
}

/** A user with a session. */
export class User {
  constructor(grpc, user, secret) {
    Object.assign(this, { grpc, user, secret, email: user.email });
  }

  call(service, method, message) {
    return this.grpc.call(service, method, message, this.secret);
  }

  /** Registers the steps of a kind of jobs: names, and points or whole step configurations. */
  async register(steps, { tag = "ct", name = "Chest CT analysis", version = "2.3.1" } = {}) {
    await this.call("ConfigurationService", "RegisterJobConfiguration", { tag, name, version, steps });
  }

  async createJob(customer, { tag = "ct", id = `ct-${randomUUID().slice(0, 8)}`, name = "", ...rest } = {}) {
    const { job } = await this.call("JobService", "CreateJob", {
      providerJobId: id,
      providerJobName: name,
      customerId: customer.user.id,
      configurationTag: tag,
      ...rest,
    });
    return job;
  }

  async append(job, ...events) {
    const batch = events.map(({ kind, metadata, ...rest }) => ({
      id: randomUUID(),
      kind: `EVENT_KIND_${kind.toUpperCase()}`,
      ...(metadata && { metadata: struct(metadata) }),
      ...rest,
    }));
    return this.#until(() => this.call("EventService", "AppendEvents", { jobId: job.id, events: batch }));
  }

  /** Sends a repeatable write until it is answered, as the server may be away. */
  async #until(send) {
    for (;;) {
      try {
        return await send();
      } catch (error) {
        if (error.code !== grpc.status.UNAVAILABLE && error.code !== grpc.status.DEADLINE_EXCEEDED) throw error;
        await new Promise(resolve => setTimeout(resolve, 100));
      }
    }
  }

  async listEvents(job) {
    const events = [];
    let pageToken = "";
    do {
      const page = await this.call("EventService", "ListEvents", { jobId: job.id, pageSize: 500, pageToken });
      events.push(...page.events);
      pageToken = page.nextPageToken;
    } while (pageToken);
    return events;
  }

  async share(job, seconds) {
    return this.call("AuthService", "CreateWatchToken", { jobId: job.id, note: "test", lifetime: { seconds } });
  }
}

const struct = metadata => ({
  fields: Object.fromEntries(
    Object.entries(metadata).map(([key, value]) => [
      key,
      typeof value === "number"
        ? { numberValue: value }
        : typeof value === "boolean"
          ? { boolValue: value }
          : { stringValue: value },
    ]),
  ),
});
