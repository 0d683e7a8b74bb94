// The view of one job: its head, its reading, its steps and its events, live.

import { now } from "./api.js";
import { showConnection } from "./connection.js";
import { $, copy, fill, h, icon, link, outside, setAttribute, setText, template } from "./dom.js";
import { Events } from "./events.js";
import { Log } from "./log.js";
import { openShare } from "./share.js";
import { mayShare } from "./session.js";
import { Steps } from "./steps.js";
import { SetBack, Watch } from "./watch.js";
import { about, clock, day, fullName, percent, plural, span, STATUS, time, when, word } from "./words.js";

const PAGE = 500;
const LONG_NAME = 90;

/** Opens a job in `main`; `who` is what GetCurrentUser answers for `client`. Returns how to close it. */
export async function openJob(main, client, who, id, signal) {
	const { job, jobConfiguration } = await client.call("JobService/GetJob", { jobId: id }, signal);
	const view = new JobView(main, client, who, job, jobConfiguration);
	return () => view.close();
}

class JobView {
	#root;
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
	#connection = { name: "catching" };
	#printing = () => this.#events.print(true);
	#printed = () => this.#events.print(false);

	constructor(main, client, who, job, configuration) {
		this.#client = client;
		this.#who = who;
		this.#job = job;
		this.#log = new Log(job, configuration);
		this.#log.tell(job);
		this.#known = Number(job.lastSequence ?? 0);
		main.replaceChildren(template("t-job"));
		this.#root = main;
		this.#head(configuration);
		this.#steps = new Steps(main, this.#log);
		this.#events = new Events(main, this.#log, now);
		addEventListener("beforeprint", this.#printing);
		addEventListener("afterprint", this.#printed);
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
		removeEventListener("beforeprint", this.#printing);
		removeEventListener("afterprint", this.#printed);
	}

	// What the watch asks for

	#request() {
		const { last } = this.#log;
		if (this.#token) return { jobId: this.#job.id, resumeToken: this.#token };
		// What was read by pages has no token: the last event is asked for once more, to see that the log still has it.
		return last > 1 ? { jobId: this.#job.id, afterSequence: `${last - 1}` } : { jobId: this.#job.id };
	}

	#deliver(message) {
		if (message.events) this.#take(message.events.events);
		this.#log.tell((message.caughtUp ?? message.end)?.job);
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
		this.#known = Math.max(this.#known, this.#log.last);
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
			root = this.#root,
			title = job.providerJobName || job.providerJobId;
		setText($("#name", root), title);
		$("#name", root).classList.toggle("long", title.length > LONG_NAME);
		const fact = (name, ...values) =>
			h(
				"div",
				{},
				h("dt", {}, name),
				values.map(value => h("dd", {}, value)),
			);
		const person = party =>
			h("bdi", { class: fullName(party) ? null : "mono" }, fullName(party) || `${party?.id.slice(0, 8)}…`);
		const until = time(this.#who.watchToken?.expiresAt);
		$("#meta", root).append(
			fact("Id", [
				h("bdi.mono", {}, job.providerJobId),
				h(
					"button.bare",
					{ type: "button", "aria-label": "Copy the id", click: event => copy(job.providerJobId, event.currentTarget) },
					icon("copy"),
				),
			]),
			fact("Configuration", [
				h("bdi", {}, job.configurationName || configuration.name),
				` ${job.configurationVersion}`,
			]),
			fact("Run by", person(job.provider)),
			fact("for", person(job.customer)),
			until ? fact("Link good until", when(until)) : "",
		);
		const share = $("#share", root);
		share.hidden = !this.#who.user || this.#who.user.id !== job.provider.id || !mayShare(this.#who);
		share.addEventListener("click", () => openShare(this.#client, job.id));
	}

	/** Many events become one drawing. */
	#later() {
		this.#frame ??= requestAnimationFrame(() => this.#draw());
	}

	#tick() {
		this.#drawTimes();
		this.#events.tick();
	}

	#draw() {
		this.#frame = undefined;
		const { status, percent: value } = this.#log.state,
			closed = this.#log.closedAt !== undefined;
		const words = word(STATUS, status) + (status === "failed" && closed ? ", closed" : "");
		setAttribute($("#status", this.#root), "data-s", status);
		fill($("#status", this.#root), [words], () => [icon(status), words]);
		document.title = `${percent(value)} ${words} – ${$("#name", this.#root).textContent} – milepost`;
		this.#events.draw(this.#log.takeRecovered());
		this.#drawTimes();
		this.#speak(words, value);
	}

	/** What moves with the time alone, too. */
	#drawTimes() {
		const ms = now();
		this.#steps.draw(ms);
		const plates = this.#plates();
		fill(
			$("#plates", this.#root),
			plates.map(plate => plate.key),
			() => plates.map(plate => plate.make()),
		);
		const facts = this.#facts(ms);
		fill($("#facts", this.#root), facts, () =>
			facts.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", {}, more))),
		);
		showConnection($("#connection", this.#root), this.#connection, {
			catching:
				this.#log.last && this.#known > this.#log.last
					? `Catching up, event ${this.#log.last} of ${this.#known}`
					: "Catching up",
			retry: () => this.#watch.retry(),
		});
	}

	#facts(ms) {
		const { first, last, closedAt } = this.#log,
			latest = this.#log.entries.at(-1),
			created = time(this.#job.createdAt),
			begun = first?.at ?? created;
		const facts = [[first ? "Started" : "Created", clock(begun), day(begun)]];
		if (closedAt) facts.push(["Took", span((closedAt - begun) / 1000), `until ${clock(closedAt)}`]);
		else if (first) facts.push(["Elapsed", span((ms - begun) / 1000), plural(last, "event")]);
		else facts.push(["Waiting", span((ms - begun) / 1000), "for the first event"]);
		if (latest && !closedAt) facts.push(["Last event", `${about((ms - latest.at) / 1000)} ago`, clock(latest.at)]);
		return facts;
	}

	#plates() {
		const log = this.#log,
			{ status, percent: value } = log.state,
			{ closed, closedAt } = log,
			plates = [];
		const add = (state, head, lines, more) =>
			plates.push({ key: [state, head, lines], make: () => plate(state, head, lines, more?.()) });
		if (closedAt) {
			const errors = log.counts.error ?? 0,
				end = `on ${when(closedAt)}, after ${span((closedAt - (log.first?.at ?? time(this.#job.createdAt))) / 1000)}`;
			const way = !closed
				? "."
				: errors
					? `, with ${errors === 1 ? "one error" : plural(errors, "error")} on the way, recovered.`
					: ", without an error.";
			const words = status === "failed" ? "Failed and closed" : word(STATUS, status);
			add(
				status,
				closed?.name || word(STATUS, status),
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
				`Failed at ${clock(error.at)}${step ? `, in step ${step.n}` : ""}. The job is still open: it recovers with the next step that is done.`,
			]);
		}
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
					: ["You are signed out", "What you read stays. Load the page again to sign in."];
			add("look", head, [text]);
		}
		return plates;
	}

	#seenAt = now();

	/** Said aloud: a change of status, and each step that is done. */
	#speak(words, value) {
		const { step, words: before } = this.#spoken;
		if (this.#connection.name === "catching") return;
		if (before !== undefined && (step || before !== words))
			setText(
				$("#say", this.#root),
				`${words}, ${value} percent.${step ? ` Done: ${step.stepName || step.name}.` : ""}`,
			);
		this.#spoken = { words };
	}
}

function plate(state, head, lines, more) {
	return h(
		"section.plate",
		{ "data-s": state },
		h(
			"div",
			{},
			h("h2", {}, icon(state), h("span", { dir: "auto" }, head)),
			lines.map(line => h("p", { dir: "auto" }, line)),
		),
		more,
	);
}

/** The links that the last event carries, as buttons. */
const links = metadata =>
	Object.entries(metadata ?? {})
		.filter(([, value]) => link(value))
		.map(([name, value]) => h("a.button", { href: link(value), ...outside }, h("bdi", {}, name), icon("out")));
