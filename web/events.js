// The pane of events: search, kinds, follow, and the list.

import { now } from "./api.js";
import { $, $$, h, icon, setAttribute, setText } from "./dom.js";
import { VirtualList } from "./list.js";
import { FAMILIES, family } from "./log.js";
import { reported } from "./steps.js";
import { ago, exact, iso, KIND, number, percent, plural, span, word } from "./words.js";

const ROW_PX = 36;
const SEARCH_PAUSE_MS = 150;

export class Events {
	#log;
	#list;
	#box;
	#found = [];
	#count = 0;
	#printing = false;
	#unseen = 0;
	#shown = 0;
	#sought = "";
	#off = new Set();
	#at = -1;
	#timer;

	constructor(log) {
		this.#log = log;
		this.#box = $("#events");
		this.#list = new VirtualList(
			this.#box,
			ROW_PX,
			each => this.#row(each),
			() => this.#follow(false),
		);
		this.#list.items = this.#found;
		for (const [kind, name] of Object.entries(FAMILIES))
			$("#kinds").append(
				h(
					"label.chip",
					h("input", { type: "checkbox", checked: true, value: kind }),
					name,
					" ",
					h("span", { "data-kind": kind }, 0),
				),
			);
		$("#find").addEventListener("input", () => {
			clearTimeout(this.#timer);
			this.#timer = setTimeout(() => this.#sift(), SEARCH_PAUSE_MS);
		});
		$("#kinds").addEventListener("change", () => this.#sift());
		$("#follow").addEventListener("click", () => this.#follow(!this.#list.stick));
		$("#latest").addEventListener("click", () => this.#follow(true));
		this.#box.addEventListener("keydown", event => this.#key(event));
		this.#box.addEventListener("click", event => {
			const button = event.target.closest("button[data-to]");
			if (button) this.goTo(Number(button.dataset.to));
		});
	}

	close() {
		clearTimeout(this.#timer);
		this.#list.resize.disconnect();
	}

	/** Shows what was added to the log, and what it changed. */
	draw(recovered = []) {
		const { entries } = this.#log;
		if (entries.length < this.#shown) this.#sift();
		const lines = this.#found.length,
			last = this.#found.at(-1);
		for (const each of entries.slice(this.#shown)) this.#add(each);
		if (!this.#list.stick) this.#unseen += this.#found.length - lines;
		this.#shown = entries.length;
		this.#box.hidden = !this.#found.length;
		this.#list.draw();
		if (last !== this.#found[lines - 1]) this.#list.change(lines - 1);
		for (const each of recovered) {
			const index = this.#indexOf(each.n);
			if (index >= 0) this.#list.change(index);
		}
		this.tick();
		this.#drawWords();
	}

	/** Moves the times on, and ends what is under way. */
	tick() {
		for (const [index, row] of this.#list.rows) {
			const each = this.#found[index],
				fill = $(".mini", row);
			setText($(".rel", row), ago(each.at, now()));
			if (fill) setAttribute(fill, "data-s", this.#stateOf(each));
		}
	}

	/** Puts each event into the document, to be printed. */
	print(whole) {
		this.#printing = whole;
		if (this.#log.counts.progress) this.#sift();
		this.#list.print(whole);
	}

	/** Brings an event into sight and to the reader. */
	goTo(n) {
		if (this.#indexOf(n) < 0) {
			$("#find").value = "";
			for (const box of $$("#kinds input")) box.checked = true;
			this.#sift();
		}
		this.#follow(false);
		this.#focus(this.#indexOf(n));
	}

	/** Adds an event that fits. Reports of a step in a row are one line, unless they are searched or printed. */
	#add(each) {
		if (!this.#fits(each)) return;
		const last = this.#found.at(-1),
			moves = last?.n === each.n - 1 && areReports(last, each) && !this.#sought && !this.#printing;
		each.reports = moves ? last.reports + 1 : 1;
		each.reported = each.stepPercent ?? (moves ? last.reported : undefined);
		if (moves) this.#found.pop();
		this.#found.push(each);
		this.#count++;
	}

	#stateOf(each) {
		return this.#log.stateOf(this.#log.steps.get(each.tag)) === "now" ? "now" : "done";
	}

	#fits(each) {
		return !this.#off.has(family(each.kind)) && (!this.#sought || textOf(each).includes(this.#sought));
	}

	#sift() {
		this.#sought = $("#find").value.trim().toLowerCase();
		this.#off = new Set($$("#kinds input:not(:checked)").map(box => box.value));
		this.#found = [];
		this.#count = 0;
		for (const each of this.#log.entries) this.#add(each);
		this.#shown = this.#log.entries.length;
		this.#at = -1;
		this.#box.hidden = !this.#found.length;
		this.#list.replace(this.#found);
		this.#drawWords();
	}

	/** The line of an event. The events found are in their order, so that one is found by halves. */
	#indexOf(n) {
		let low = 0,
			high = this.#found.length;
		while (low < high) {
			const middle = (low + high) >> 1;
			if (this.#found[middle].n < n) low = middle + 1;
			else high = middle;
		}
		const line = this.#found[low];
		return line && n > line.n - line.reports ? low : -1;
	}

	#drawWords() {
		const { counts, entries } = this.#log,
			sifted = this.#sought || this.#off.size;
		for (const kind of Object.keys(FAMILIES)) setText($(`[data-kind=${kind}]`), number(counts[kind] ?? 0));
		const none = entries.length ? "No event is like that." : "Nothing yet. Events show here as they come.",
			all = entries.length ? `${number(entries.length)}, newest at the bottom` : "";
		setText($("#events-none"), this.#found.length ? "" : none);
		setText($("#events-n"), sifted ? `${number(this.#count)} found` : all);
		setAttribute($("#follow"), "aria-checked", `${this.#list.stick}`);
		if (this.#list.stick) this.#unseen = 0;
		$("#latest").hidden = !this.#unseen;
		setText($("#latest"), `${number(this.#unseen)} new`);
	}

	#follow(yes) {
		this.#list.stick = yes;
		if (yes) this.#list.draw();
		this.#drawWords();
	}

	#key(event) {
		const last = this.#found.length - 1,
			row = event.target.closest("li");
		const at = row ? this.#indexOf(Number(row.dataset.sequence)) : this.#at;
		const to = {
			ArrowDown: Math.min(at + 1, last),
			ArrowUp: at < 0 ? last : Math.max(at - 1, 0),
			PageDown: Math.min(at + 10, last),
			PageUp: Math.max(at - 10, 0),
			Home: 0,
			End: last,
		}[event.key];
		if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
		event.preventDefault();
		this.#follow(event.key === "End");
		this.#focus(to);
	}

	#focus(index) {
		this.#at = index;
		this.#list.reveal(index)?.focus({ preventScroll: true });
	}

	#row(each) {
		const step = this.#log.steps.get(each.tag),
			inside = each.stepName && h("bdi", each.stepName);
		const what = each.name ? [h("b", { dir: "auto" }, each.name), inside && h("span.k", " in ", inside)] : inside;
		return h(
			each.n - each.reports >= this.newAfter ? "li.new" : "li",
			{ tabindex: -1, "data-sequence": each.n, "data-reports": each.reports > 1 && each.reports, "data-s": each.kind },
			h("span.n", each.n),
			icon(each.kind),
			h(
				"div",
				h("p", h("span.k", word(each.kind, KIND)), " ", what),
				each.reported >= 0 && [
					h("span.mini", { "data-s": this.#stateOf(each), vars: { "--part": `${each.reported}%` } }, h("i")),
					percent(each.reported),
				],
				each.reports > 1 && h("span.k", plural(each.reports, "report")),
			),
			h(
				"time",
				{ datetime: iso(each.at) },
				h("span.rel", ago(each.at, now())),
				h("span.abs", exact(each.at), each.occurred && ` (occurred ${exact(each.occurred)})`),
			),
			reported(each.metadata, step?.metadata),
			each.by &&
				h(
					"p.healed",
					"Recovered by ",
					h("button.textual", { "data-to": each.by.n }, each.by.n, " ", h("bdi", each.by.stepName || each.by.name)),
					`, ${span(each.by.at - each.at)} later`,
				),
		);
	}

	/** Rows of later events blink once. */
	newAfter = Infinity;
}

const areReports = (a, b) => a.kind === "progress" && b.kind === a.kind && a.tag === b.tag;

/** What a search looks through. */
const textOf = each =>
	[word(each.kind, KIND), each.name, each.stepName, each.stepPercent, ...Object.entries(each.metadata ?? {}).flat()]
		.join("\n")
		.toLowerCase();
