// The events of a job in their order, and what follows from them: the status, the percent and the state of each step.

import { SetBack } from "./watch.js";
import { plain, time } from "./words.js";

/** Whether an event is the provider's own. */
const isProviders = each => !["silent", "cancellation_requested"].includes(each.kind);

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
	stepPercent: event.stepPercent,
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
		// The percent of a step is -1 while it is to come, 0 to 99 under way, and 100 once it is done. It never falls.
		this.steps = new Map(this.configured.map(step => [step.tag, { ...step, percent: -1 }]));
		this.counts = {};
		this.closed = this.asked = null;
		this.openErrors = [];
		// The errors that were recovered since the last drawing.
		this.recovered = [];
		this.state = { sequence: 0, status: "pending", percent: 0 };
	}

	get last() {
		return this.entries.length;
	}
	get first() {
		return this.entries.find(isProviders);
	}
	/** When the work was begun or, before, the job created. */
	get begun() {
		return this.first?.at ?? time(this.job.createdAt);
	}
	get latest() {
		return this.entries.findLast(isProviders);
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

	/** The state that the server tells beside the events: of a job whose events are not all here, and of its steps. */
	tell(state, steps = []) {
		const sequence = Number(state?.lastSequence ?? 0);
		if (state && sequence >= this.state.sequence)
			this.state = { sequence, status: plain("JOB_STATUS_", state.status), percent: state.progress?.percent ?? 0 };
		for (const { stepTag, status, percent = 0 } of steps)
			if (status !== "STEP_STATUS_TO_COME") this.#move(this.steps.get(stepTag), percent);
	}

	#move(step, percent) {
		if (step) step.percent = Math.max(step.percent, percent);
	}

	#apply(each) {
		const step = this.steps.get(each.tag),
			kind = family(each.kind);
		if (each.n >= this.state.sequence) this.state = { sequence: each.n, status: each.status, percent: each.percent };
		this.counts[kind] = (this.counts[kind] ?? 0) + 1;
		this.#move(step, each.kind === "step" ? 100 : (each.stepPercent ?? 0));
		if (step && !step.done) step.begun ??= each;
		if (each.kind === "error") {
			this.openErrors.push(each);
			if (step && !step.done) step.error = each;
		}
		if (step && each.kind === "step") step.done ??= each;
		if (each.kind === "step" || each.kind === "progress") {
			for (const error of this.openErrors) error.by = each;
			this.recovered.push(...this.openErrors);
			this.openErrors = [];
		}
		if (each.kind === "cancellation_requested") this.asked = each;
		if (each.kind === "complete" || each.kind === "close") this.closed = each;
	}

	/** When the job was closed, or undefined. */
	get closedAt() {
		return this.closed?.at ?? time(this.job.closedAt);
	}
	/** When the customer asked to cancel the job, or undefined. */
	get askedAt() {
		return this.asked?.at ?? time(this.job.cancellationRequestedAt);
	}
	get stepsDone() {
		return [...this.steps.values()].filter(step => step.percent === 100).length;
	}

	stateOf(step) {
		const { status } = this.state;
		if (step.percent === 100) return step.error ? "healed" : "done";
		if (status === "complete") return "skipped";
		if (status === "failed" && step.error && !step.error.by) return "failed";
		return this.closedAt ? "left" : step.percent < 0 ? "todo" : status === "stalled" ? status : "now";
	}
}

export const FAMILIES = { step: "Steps", progress: "Progress", info: "Notes", error: "Errors", job: "Job" };
export const family = kind => (kind in FAMILIES ? kind : "job");
