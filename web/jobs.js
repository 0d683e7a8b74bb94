// The list of jobs: filters that have their address, pages, and the present state of each job.
//
// A watch from now starts first; once it is caught up the list is read, so that no event is missed between the two. An
// event moves the row of its job. What no event can tell (a job that was created, or that came under a filter) is read.

import { now } from "./api.js";
import { showConnection } from "./connection.js";
import { download } from "./download.js";
import { $, $$, fill, h, icon, setAttribute, setText, show } from "./dom.js";
import { Month } from "./month.js";
import { jobAddress, note } from "./router.js";
import {
	ago,
	day,
	fullName,
	iso,
	minutes,
	nameOf,
	percent,
	plain,
	plural,
	STATUSES,
	time,
	when,
	word,
} from "./words.js";
import { Watch } from "./watch.js";

const PAGE = 50;
const MOST = 500;
const SHORTEST = 3;
const FIELDS = ["text", "labels", "tag", "open", "from", "before"];
const SOON_MS = 1000;
const AGAIN_MS = 15_000;
const TODAY_MS = 12 * 3600_000;

/** `ward=3 b unit=ct` are two labels: each begins with a key without spaces and its `=`. */
const labelsOf = text =>
	Object.fromEntries(
		text
			.trim()
			.split(/\s+(?=[^\s=]+=)/)
			.filter(Boolean)
			.map(label => [label.split("=")[0], label.split(/=(.*)/s)[1] ?? ""]),
	);
const textOf = labels =>
	Object.entries(labels)
		.sort()
		.map(each => each.join("="));

const sequence = job => Number(job?.lastSequence ?? 0);

/** Opens the list; `ended` is called when the credential has ended. */
export function openJobs(client, who, parameters, ended) {
	show("t-jobs", "Jobs");
	const view = new JobsView(client, who, parameters, ended);
	return () => view.close();
}

class JobsView {
	#client;
	#provider;
	#form;
	#watch;
	#connection = { name: "catching" };
	#jobs = new Map();
	#rows = new Map();
	#shown = PAGE;
	#more = false;
	#reading;
	#soon;
	#later;
	#timers;
	#parties = new Map();
	#month;
	#saving = new AbortController();

	constructor(client, who, parameters, ended) {
		this.#client = client;
		this.#provider = who.user.role === "USER_ROLE_PROVIDER";
		this.#form = $("#filters");
		this.#restore(parameters);
		this.#form.addEventListener("submit", event => event.preventDefault());
		this.#form.addEventListener("input", () => this.#filter());
		this.#month = new Month(parameters.get("month"), (...range) => this.#summarize(...range), () => this.#note());
		this.#month.read();
		$("#csv").addEventListener("click", ({ target }) => this.#save(target));
		$("#more").addEventListener("click", () => {
			this.#shown += PAGE;
			this.#read();
		});
		this.#timers = [
			setInterval(() => this.#tick(), 1000),
			setInterval(() => {
				if (this.#connection.name !== "live") return;
				this.#read();
				this.#month.read();
			}, AGAIN_MS),
		];
		this.#watch = new Watch(client, {
			request: () => ({ allJobs: {}, fromNow: {} }),
			restart: () => {},
			readPages: async signal => void (await this.#list(signal)),
			deliver: message => this.#deliver(message),
			report: state => {
				this.#connection = state;
				if (state.error?.ended) ended(state.error);
				else this.#tick();
			},
		});
		this.#suggest();
	}

	close() {
		this.#watch.stop();
		this.#reading?.abort("closed");
		this.#saving.abort("closed");
		clearTimeout(this.#soon);
		clearTimeout(this.#later);
		this.#timers.forEach(clearInterval);
	}

	#deliver(message) {
		if (message.caughtUp) this.#read();
		for (const event of message.events?.events ?? []) {
			const job = this.#jobs.get(event.jobId);
			if (job && Number(event.sequence) > sequence(job)) {
				Object.assign(job, {
					status: event.status,
					progress: event.progress,
					lastSequence: event.sequence,
					updatedAt: event.createdAt,
				});
				this.#drawRow(job);
			}
			if (!job || this.#statuses().length || this.#form.elements.open.value) this.#readSoon();
		}
		this.#tick();
	}

	#readSoon() {
		this.#soon ??= setTimeout(() => {
			this.#soon = undefined;
			this.#read();
		}, SOON_MS);
	}

	/** Reads the list again; a reading that is under way is given up. */
	async #read() {
		this.#reading?.abort("again");
		const { signal } = (this.#reading = new AbortController());
		try {
			await this.#list(signal);
		} catch (error) {
			if (signal.aborted) return;
			// The watch notices what is wrong with the connection; only what the filters ask for is told here.
			if (!error.passing) this.#refused(error);
		}
	}

	async #list(signal) {
		const jobs = [];
		let pageToken = "";
		do {
			const page = await this.#client.call(
				"JobService/ListJobs",
				{ filter: this.#request(), pageSize: Math.min(MOST, this.#shown - jobs.length), pageToken },
				signal,
			);
			jobs.push(...(page.jobs ?? []));
			pageToken = page.nextPageToken;
		} while (pageToken && jobs.length < this.#shown);
		if (signal.aborted) return;
		this.#more = Boolean(pageToken);
		const before = this.#jobs;
		// An event may have come while the list was read: the later state stays.
		this.#jobs = new Map(
			jobs.map(job => {
				const known = before.get(job.id);
				return [job.id, sequence(known) > sequence(job) ? known : job];
			}),
		);
		this.#draw();
	}

	#refused(error) {
		this.#jobs = new Map();
		this.#more = false;
		this.#draw(error.code === "not_found" ? "You have no configuration with this tag." : error.message);
	}

	// Filters

	#statuses() {
		return $$("#statuses :checked").map(box => box.value);
	}

	#request() {
		const { text, labels, tag, who, open, from, before } = this.#form.elements,
			moment = input => (input.value ? new Date(`${input.value}T00:00`).toISOString() : undefined);
		return {
			statuses: this.#statuses().map(status => `JOB_STATUS_${status.toUpperCase()}`),
			openness: `JOB_OPENNESS_${open.value.toUpperCase() || "UNSPECIFIED"}`,
			configurationTag: tag.value.trim(),
			counterpartId: who.value,
			text: [...text.value].length < SHORTEST ? "" : text.value,
			labels: labelsOf(labels.value),
			createdFrom: moment(from),
			createdBefore: moment(before),
		};
	}

	#restore(parameters) {
		const statuses = parameters.get("status")?.split(",") ?? [];
		for (const status of STATUSES)
			$("#statuses").append(
				h(
					"label.chip",
					{ "data-s": status },
					h("input", { type: "checkbox", value: status, checked: statuses.includes(status) }),
					icon(status),
					word(status),
				),
			);
		for (const field of FIELDS) this.#form.elements[field].value = parameters.get(field) ?? "";
		const who = parameters.get("who");
		if (who) this.#party({ id: who }).selected = true;
	}

	async #summarize(createdFrom, createdBefore, timeZone) {
		const { groups = [] } = await this.#client.call("JobService/SummarizeJobs", {
			filter: { ...this.#request(), createdFrom, createdBefore },
			period: "SUMMARY_PERIOD_DAY",
			timeZone,
		});
		return groups;
	}

	async #save(button) {
		button.disabled = true;
		try {
			await download(this.#client, this.#request(), this.#saving.signal);
		} catch (error) {
			if (!this.#saving.signal.aborted) this.#refused(error);
		}
		button.disabled = false;
	}

	#filter() {
		this.#note();
		this.#shown = PAGE;
		this.#readSoon();
		clearTimeout(this.#later);
		this.#later = setTimeout(() => this.#month.read(), SOON_MS);
	}

	#note() {
		const parameters = Object.fromEntries(
			["who", ...FIELDS].map(field => [field, this.#form.elements[field].value]).filter(([, value]) => value),
		);
		const statuses = this.#statuses();
		const { key: month } = this.#month;
		note("/jobs", { ...(statuses.length && { status: statuses.join(",") }), ...parameters, ...(month && { month }) });
	}

	/** A label of a job becomes a filter, or no longer is one. */
	#toggle(label) {
		const { labels } = this.#form.elements,
			given = textOf(labelsOf(labels.value));
		labels.value = (given.includes(label) ? given.filter(each => each !== label) : [...given, label]).join(" ");
		this.#filter();
	}

	/** A counterpart that was seen can be chosen. */
	#party(party) {
		let option = this.#parties.get(party.id);
		if (!option) {
			option = h("option", { value: party.id });
			this.#parties.set(party.id, option);
			this.#form.elements.who.append(option);
		}
		setText(option, fullName(party) || option.textContent || nameOf(party));
		return option;
	}

	#tag(tag) {
		if (!$$("#tags option").some(option => option.value === tag)) $("#tags").append(h("option", { value: tag }));
	}

	/** A provider can choose among the tags of its configurations. */
	async #suggest() {
		if (!this.#provider) return;
		try {
			const { jobConfigurations = [] } = await this.#client.call("ConfigurationService/ListJobConfigurations", {
				pageSize: MOST,
			});
			for (const { tag } of jobConfigurations) this.#tag(tag);
		} catch (error) {
			// A key may lack the right. Then the tags of the jobs in sight are suggested.
			if (error.passing) this.#readSoon();
		}
	}

	// Rows

	#draw(refusal) {
		const jobs = [...this.#jobs.values()];
		for (const [id, row] of this.#rows)
			if (!this.#jobs.has(id)) {
				row.element.remove();
				this.#rows.delete(id);
			}
		let next = $("#jobs").firstChild;
		for (const job of jobs) {
			const row = this.#rows.get(job.id) ?? this.#makeRow(job);
			if (row.element === next) next = next.nextSibling;
			else $("#jobs").insertBefore(row.element, next);
			this.#drawRow(job);
		}
		$(".list table").hidden = !jobs.length;
		$("#more").hidden = !this.#more;
		setText($("#list-n"), jobs.length ? `${plural(jobs.length, "job")}${this.#more ? ", older ones follow" : ""}` : "");
		const sifted = refusal || /\?(?!month=[^&]*$)/.test(location.hash);
		const [head, text] = sifted
			? ["No job is like that", refusal ?? "Every filter must hold."]
			: ["No jobs yet", "A job shows here as soon as it is created, whether you run it or it is run for you."];
		fill($("#empty"), [jobs.length > 0, head, text], () => [
			!jobs.length && [h("h3", head), h("p", text)],
			!jobs.length && sifted && h("button", { click: () => this.#reset() }, "Clear the filters"),
		]);
		this.#tick();
	}

	#reset() {
		this.#form.reset();
		for (const box of $$("#statuses :checked")) box.checked = false;
		for (const element of this.#form.elements) if (element.name) element.value = "";
		this.#filter();
		this.#form.elements.text.focus();
	}

	#makeRow(job) {
		const created = time(job.createdAt),
			other = this.#provider ? job.customer : job.provider;
		this.#party(other);
		this.#tag(job.configurationTag);
		const row = { status: h("span"), bar: h("i"), value: h("b"), updated: h("td.j-u") };
		row.element = h(
			"tr",
			{ "data-job": job.id },
			h("td.j-s", row.status),
			h(
				"td.j-n",
				h("a.clip", { dir: "auto", href: jobAddress(job.id) }, job.providerJobName || job.providerJobId),
				job.providerJobName && h("small.mono.clip", { dir: "auto" }, job.providerJobId),
				textOf(job.labels ?? {}).map(label => h("button.tag", { dir: "auto", click: () => this.#toggle(label) }, label)),
			),
			h("td.j-p", h("span", h("span.mini", row.bar), row.value)),
			h("td", h("span.clip", { dir: "auto" }, nameOf(other))),
			h(
				"td.j-c",
				h("span.clip", { dir: "auto" }, job.configurationName || job.configurationTag),
				" ",
				h("small", job.configurationVersion),
			),
			h(
				"td.j-t",
				h(
					"time",
					{ datetime: iso(created), title: when(created) },
					now() - created < TODAY_MS ? minutes(created) : day(created),
				),
			),
			row.updated,
		);
		this.#rows.set(job.id, row);
		return row;
	}

	#drawRow(job) {
		const row = this.#rows.get(job.id),
			status = plain("JOB_STATUS_", job.status),
			value = job.progress?.percent ?? 0;
		if (!row) return;
		setAttribute(row.element, "data-s", status);
		const given = textOf(labelsOf(this.#form.elements.labels.value));
		for (const tag of $$(".tag", row.element)) setAttribute(tag, "aria-pressed", `${given.includes(tag.textContent)}`);
		fill(row.status, [status], () => [icon(status), word(status)]);
		row.bar.style.setProperty("--part", `${value}%`);
		setText(row.value, percent(value));
		row.at = time(job.updatedAt);
	}

	#tick() {
		for (const row of this.#rows.values()) setText(row.updated, row.at ? ago(row.at, now()) : "");
		showConnection($("#connection"), this.#connection, { retry: () => this.#watch.retry() });
	}
}
