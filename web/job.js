// The view of one job: its head, its reading, its steps and its events, live.

import { now } from "./api.js";
import { showConnection } from "./connection.js";
import { $, copy, fact, fill, h, icon, link, openDialog, outside, setAttribute, setText, show } from "./dom.js";
import { Events } from "./events.js";
import { submit } from "./form.js";
import { Log } from "./log.js";
import { openShare } from "./share.js";
import { may } from "./session.js";
import { Steps } from "./steps.js";
import { SetBack, Watch } from "./watch.js";
import { about, ago, clock, day, fullName, minutes, nameOf, percent, plural, span, time, when, word } from "./words.js";

const PAGE = 500;
const LONG_NAME = 90;
const MINUTE_MS = 60_000;

/** Opens a job; `who` is what GetCurrentUser answers for `client`. Returns how to close it. */
export async function openJob(client, who, id, signal) {
	const { job, jobConfiguration, steps } = await client.call("JobService/GetJob", { jobId: id }, signal);
	const view = new JobView(client, who, job, jobConfiguration, steps);
	return () => view.close();
}

class JobView {
	#client;
	#who;
	#job;
	#log;
	#steps;
	#events;
	#watch;
	#timer;
	#frame;
	#token;
	#known;
	#spoken = {};
	#estimate = null;
	#estimated;
	#connection = { name: "catching" };
	#print = event => this.#events.print(event.type === "beforeprint");

	constructor(client, who, job, configuration, steps) {
		this.#client = client;
		this.#who = who;
		this.#job = job;
		this.#log = new Log(job, configuration);
		this.#log.tell(job, steps);
		this.#known = Number(job.lastSequence ?? 0);
		show("t-job", "Job");
		this.#head(configuration);
		this.#steps = new Steps(this.#log);
		this.#events = new Events(this.#log);
		addEventListener("beforeprint", this.#print);
		addEventListener("afterprint", this.#print);
		this.#timer = setInterval(() => this.#tick(), 1000);
		this.#watch = new Watch(client, {
			request: () => this.#request(),
			deliver: message => this.#deliver(message),
			readPages: signal => this.#readPages(signal),
			restart: () => this.#restart(),
			report: state => this.#report(state),
		});
		this.#draw();
	}

	close() {
		this.#watch.stop();
		this.#events.close();
		clearInterval(this.#timer);
		cancelAnimationFrame(this.#frame);
		removeEventListener("beforeprint", this.#print);
		removeEventListener("afterprint", this.#print);
	}

	// What the watch asks for

	#request() {
		const { last } = this.#log,
			jobId = this.#job.id;
		if (this.#token) return { jobId, resumeToken: this.#token };
		// What was read by pages has no token: the last event is asked for once more, to see that the log still has it.
		return last > 1 ? { jobId, afterSequence: `${last - 1}` } : { jobId };
	}

	#deliver(message) {
		if (message.events) this.#take(message.events.events);
		this.#log.tell((message.caughtUp ?? message.end)?.job, message.caughtUp?.steps);
		this.#token = message.resumeToken;
		this.#later();
	}

	async #readPages(signal) {
		const { last } = this.#log,
			afterSequence = `${Math.max(0, last - 1)}`;
		let pageToken = "",
			seen = last === 0;
		do {
			const page = await this.#client.call(
				"EventService/ListEvents",
				{ jobId: this.#job.id, afterSequence, pageSize: PAGE, pageToken },
				signal,
			);
			seen ||= Number(page.events?.[0]?.sequence) === last;
			if (this.#take(page.events).length) this.#token = undefined;
			pageToken = page.nextPageToken;
		} while (pageToken);
		if (!seen) throw new SetBack();
		this.#later();
		return Boolean(this.#log.closed);
	}

	#take(events) {
		const fresh = this.#log.take(events);
		for (const each of fresh)
			if (each.kind === "step" && this.#connection.name !== "catching") this.#spoken.step = each;
		return fresh;
	}

	#restart() {
		this.#token = undefined;
		this.#log.clear();
		this.#later();
	}

	#report(state) {
		this.#connection = state;
		if (state.name === "live") this.#events.newAfter = this.#log.last;
		this.#later();
	}

	// What is shown

	#head(configuration) {
		const job = this.#job,
			name = $("#name"),
			title = job.providerJobName || job.providerJobId;
		setText(name, title);
		name.classList.toggle("long", title.length > LONG_NAME);
		const person = party => h("bdi", { class: fullName(party) ? null : "mono" }, nameOf(party));
		const until = time(this.#who.watchToken?.expiresAt);
		$("#meta").append(
			fact("Id", [
				h("bdi.mono", job.providerJobId),
				h(
					"button.bare",
					{ "aria-label": "Copy the id", click: event => copy(job.providerJobId, event.currentTarget) },
					icon("copy"),
				),
			]),
			fact("Configuration", [h("bdi", job.configurationName || configuration.name), ` ${job.configurationVersion}`]),
			fact("Run by", person(job.provider)),
			fact("for", person(job.customer)),
			job.labels
				? fact(
						"Labels",
						Object.entries(job.labels)
							.sort()
							.map(each => h("bdi.tag", each.join("="))),
					)
				: "",
			until ? fact("Link good until", when(until)) : "",
		);
		const share = $("#share");
		share.hidden = !this.#is(job.provider);
		share.addEventListener("click", () => openShare(this.#client, job.id));
		$("#ask").addEventListener("click", () => openAsk(this.#client, job.id));
	}

	/** Whether the reader is this party, and may do what is its alone. A link's reader is nobody. */
	#is(party) {
		return this.#who.user?.id === party.id && may(this.#who, "APPEND");
	}

	/** Many events become one drawing. */
	#later() {
		this.#frame ??= requestAnimationFrame(() => this.#draw());
	}

	#tick() {
		this.#drawTimes();
		this.#events.tick();
		this.#renewEstimate();
	}

	/** Asks for an estimate after each step and each minute, one at a time, while the job is running and followed. */
	async #renewEstimate() {
		const log = this.#log;
		if (log.state.status !== "running") this.#estimate = this.#estimated = null;
		else if (["live", "paged"].includes(this.#connection.name) && this.#estimated !== "asking") {
			const key = `${log.counts.step} ${Math.floor(performance.now() / MINUTE_MS)}`;
			if (this.#estimated === key) return;
			this.#estimated = "asking";
			try {
				const { estimate } = await this.#client.call("JobService/EstimateJob", { jobId: this.#job.id });
				this.#estimate = estimate ? { p50: time(estimate.p50), p90: time(estimate.p90) } : null;
			} catch {
				// What was estimated before stays.
			}
			this.#estimated = key;
		}
	}

	#draw() {
		this.#frame = undefined;
		const { status, percent: value } = this.#log.state,
			closed = this.#log.closedAt !== undefined;
		const words = word(status) + (status === "failed" && closed ? ", closed" : "");
		setAttribute($("#status"), "data-s", status);
		fill($("#status"), [words], () => [icon(status), words]);
		document.title = `${percent(value)} ${words} – ${$("#name").textContent} – milepost`;
		$("#ask").hidden = closed || Boolean(this.#log.askedAt) || !this.#is(this.#job.customer);
		this.#events.draw(this.#log.recovered.splice(0));
		this.#drawTimes();
		this.#speak(words, value);
	}

	/** What moves with the time alone, too. */
	#drawTimes() {
		const ms = now(),
			log = this.#log,
			ahead = log.state.status === "running" && log.first ? this.#estimate : null,
			plates = this.#plates(ms),
			facts = this.#facts(ms, ahead);
		this.#steps.draw(ms, ahead);
		fill($("#plates"), plates, () => plates.map(each => plate(...each)));
		fill($("#facts"), facts, () => facts.map(each => fact(...each)));
		showConnection($("#connection"), this.#connection, {
			catching: log.last && this.#known > log.last ? `Catching up, event ${log.last} of ${this.#known}` : "",
			retry: () => this.#watch.retry(),
		});
	}

	#facts(ms, ahead) {
		const { begun, first, last, latest, closedAt } = this.#log;
		const facts = [[first ? "Started" : "Created", clock(begun), day(begun)]];
		if (closedAt) facts.push(["Took", span(closedAt - begun), `until ${clock(closedAt)}`]);
		else if (first) facts.push(["Elapsed", span(ms - begun), plural(last, "event")]);
		else facts.push(["Waiting", span(ms - begun), "for the first event"]);
		const expect = (name, at) => facts.push([name, minutes(at), at > ms ? `in ${about(at - ms)}` : ago(at, ms)]);
		if (ahead) {
			expect("Likely done", ahead.p50);
			expect("Nine in ten by", ahead.p90);
		}
		if (latest && !closedAt) facts.push(["Last event", ago(latest.at, ms), clock(latest.at)]);
		return facts;
	}

	#plates(ms) {
		const log = this.#log,
			{ status, percent: value } = log.state,
			{ asked, askedAt, closed, closedAt, latest } = log,
			plates = [];
		const add = (...each) => plates.push(each);
		if (closedAt) {
			const errors = log.counts.error ?? 0,
				end = `on ${when(closedAt)}, after ${span(closedAt - log.begun)}`;
			const way = !closed
				? "."
				: errors
					? `, with ${errors === 1 ? "one error" : plural(errors, "error")} on the way, recovered.`
					: ", without an error.";
			const words = status === "failed" ? "Failed and closed" : word(status);
			add(
				status,
				closed?.name || word(status),
				[
					status === "complete"
						? `${words} ${end}${way}`
						: `${words} ${end}, at ${percent(value)}. Nothing more will come.`,
				],
				() => links(closed?.metadata),
			);
		} else if (status === "failed" && log.openErrors.length) {
			const error = log.openErrors.at(-1),
				step = log.steps.get(error.tag);
			add(status, error.name || "Failed", [
				`Failed at ${clock(error.at)}${step ? `, in step ${step.n}` : ""}. The job is still open: it recovers when a step goes on or is done.`,
			]);
		}
		// Who was heard of last is known once all events are here.
		else if (status === "stalled" && log.last >= log.state.sequence) {
			const heard = latest?.at ?? log.begun;
			add(status, `Silent for ${about(ms - heard)}`, [
				`${latest ? "Last heard of" : "Created"} at ${clock(heard)}. The provider may be silent for ${span(1000 * parseFloat(this.#job.maxSilence))}.`,
			]);
		}
		if (askedAt && !closedAt)
			add("look", "Cancellation is asked for", [
				`${nameOf(this.#job.customer)}, ${when(askedAt)}${asked?.name ? `: “${asked.name}”` : ""}`,
				"The provider decides: the job goes on until the provider closes it.",
			]);
		const { name, error } = this.#connection;
		if (name === "offline")
			add(name, error?.code === "resource_exhausted" ? "The server is busy" : "No connection", [
				`${log.last ? `What you see is from ${clock(this.#seenAt)}. ` : ""}Nothing is lost: the page goes on from there.`,
			]);
		else this.#seenAt = now();
		if (name === "expired")
			add("look", "The events of this job were removed", [
				"They were kept for a set time after the job was closed. The job’s end stays.",
			]);
		if (name === "ended") {
			const [head, text] = !error.ended
				? ["The page cannot go on", error.message]
				: this.#who.watchToken
					? ["Your link has ended", "What you read stays. Ask whoever sent the link for a new one."]
					: ["You are signed out", "What you read stays."];
			const signIn = () => h("button", { click: () => location.reload() }, "Sign in");
			add("look", head, [text], error.ended && !this.#who.watchToken ? signIn : null);
		}
		return plates;
	}

	#seenAt = now();

	/** Said aloud: a change of status, and each step that is done. */
	#speak(words, value) {
		const { step, words: before } = this.#spoken;
		if (this.#connection.name === "catching") return;
		if (before !== undefined && (step || before !== words))
			setText($("#say"), `${words}, ${value} percent.${step ? ` Done: ${step.stepName || step.name}.` : ""}`);
		this.#spoken = { words };
	}
}

function openAsk(client, jobId) {
	const dialog = openDialog("t-ask");
	submit($("#ask-f"), async ({ reason }) => {
		await client.call("JobService/RequestCancellation", { jobId, reason: reason.value });
		// Its event, which the watch brings, shows the rest.
		dialog.close();
		$("#main").focus({ preventScroll: true });
	});
}

function plate(state, head, lines, more) {
	return h(
		"section.plate",
		{ "data-s": state },
		h(
			"div",
			h("h2", icon(state), h("bdi", head)),
			lines.map(line => h("p", { dir: "auto" }, line)),
		),
		more?.(),
	);
}

/** The links that the last event carries, as buttons. */
const links = metadata =>
	Object.entries(metadata ?? {})
		.filter(([, value]) => link(value))
		.map(([name, value]) => h("a.button", { href: link(value), ...outside }, h("bdi", name), icon("out")));
