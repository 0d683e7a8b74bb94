// The events of a job in their order, and what follows from them: the status, the percent and the state of each step.

import { SetBack } from "./watch.js";
import { plain, time } from "./words.js";

/** What is kept of an event: a page may hold 100,000 of them. */
const entry = event => ({
	id: event.id,
	n: Number(event.sequence),
	kind: plain("EVENT_KIND_", event.kind),
	name: event.name ?? "",
	tag: event.stepTag ?? "",
	stepName: event.stepName ?? "",
	metadata: event.metadata && Object.keys(event.metadata).length ? event.metadata : null,
	at: time(event.createdAt),
	occurred: time(event.occurredAt),
	status: plain("JOB_STATUS_", event.status),
	percent: event.progress?.percent ?? 0,
});

export class Log {
	constructor(job, configuration) {
		this.job = job;
		const configured = configuration.steps ?? [];
		const points = configured.map(step => Number(step.points ?? 0));
		const sum = points.reduce((a, b) => a + b, 0);
		// Where all steps have 0 points each counts 1, as the server counts.
		this.total = sum || configured.length;
		let from = 0;
		this.configured = configured.map((step, i) => {
			const weight = sum ? points[i] : 1;
			return {
				n: i + 1,
				tag: step.tag,
				name: step.name,
				points: weight,
				from: (from += weight) - weight,
				metadata: step.metadata ?? [],
			};
		});
		this.clear();
	}

	/** Forgets every event. */
	clear() {
		this.entries = [];
		this.steps = new Map(this.configured.map(step => [step.tag, { ...step }]));
		this.counts = {};
		this.closed = null;
		this.openErrors = [];
		this.recovered = [];
		this.state = { sequence: 0, status: "pending", percent: 0 };
	}

	get last() {
		return this.entries.length;
	}
	get first() {
		return this.entries[0];
	}

	/** Adds what is new of these events, and returns it. A log that does not go on from here was set back. */
	take(events = []) {
		const fresh = [];
		for (const event of events) {
			const n = Number(event.sequence);
			if (n <= this.last) {
				if (this.entries[n - 1].id !== event.id) throw new SetBack();
				continue;
			}
			if (n !== this.last + 1) throw new SetBack();
			const each = entry(event);
			this.entries.push(each);
			this.#apply(each);
			fresh.push(each);
		}
		return fresh;
	}

	/** The state that the server tells beside the events: of a job whose events are not all here. */
	tell(state) {
		const sequence = Number(state?.lastSequence ?? 0);
		if (state && sequence >= this.state.sequence)
			this.state = { sequence, status: plain("JOB_STATUS_", state.status), percent: state.progress?.percent ?? 0 };
	}

	/** The errors that were recovered since this was called last. */
	takeRecovered() {
		const recovered = this.recovered;
		this.recovered = [];
		return recovered;
	}

	#apply(each) {
		const step = this.steps.get(each.tag);
		if (each.n >= this.state.sequence) this.state = { sequence: each.n, status: each.status, percent: each.percent };
		this.counts[family(each.kind)] = (this.counts[family(each.kind)] ?? 0) + 1;
		if (step && !step.done) step.begun ??= each;
		if (each.kind === "error") {
			this.openErrors.push(each);
			if (step && !step.done) step.error = each;
		}
		if (each.kind === "step") {
			if (step) step.done ??= each;
			for (const error of this.openErrors) error.by = each;
			this.recovered.push(...this.openErrors);
			this.openErrors = [];
		}
		if (each.kind === "complete" || each.kind === "close") this.closed = each;
	}

	/** When the job was closed, or undefined. */
	get closedAt() {
		return this.closed?.at ?? time(this.job.closedAt);
	}
	get stepsDone() {
		return [...this.steps.values()].filter(step => step.done).length;
	}

	stateOf(step) {
		const { status } = this.state;
		if (step.done) return step.error ? "healed" : "done";
		if (status === "complete") return "skipped";
		if (status === "failed" && step.error && step.error === this.openErrors.at(-1)) return "failed";
		return this.closedAt ? "left" : "todo";
	}
}

export const FAMILIES = { step: "Steps", info: "Notes", error: "Errors", job: "Job" };
export const family = kind => (kind in FAMILIES ? kind : "job");
