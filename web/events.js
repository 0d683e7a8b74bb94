// The pane of events: search, kinds, follow, and the list.

import { $, $$, h, icon, setAttribute, setText } from "./dom.js";
import { VirtualList } from "./list.js";
import { FAMILIES, family } from "./log.js";
import { reported } from "./steps.js";
import { about, exact, iso, KIND, number, span, word } from "./words.js";

const ROW_PX = 36;
const SEARCH_PAUSE_MS = 150;

export class Events {
	#root;
	#log;
	#list;
	#box;
	#found = [];
	#unseen = 0;
	#shown = 0;
	#sought = "";
	#off = new Set();
	#at = -1;
	#now;
	#timer;

	constructor(root, log, now) {
		this.#root = root;
		this.#log = log;
		this.#now = now;
		this.#box = $("#events", root);
		this.#list = new VirtualList(
			this.#box,
			ROW_PX,
			each => this.#row(each),
			() => this.#follow(false),
		);
		this.#list.items = this.#found;
		for (const [kind, name] of Object.entries(FAMILIES))
			$("#kinds", root).append(
				h(
					"label.chip",
					{},
					h("input", { type: "checkbox", checked: true, value: kind }),
					name,
					" ",
					h("span", { "data-kind": kind }, 0),
				),
			);
		$("#find", root).addEventListener("input", () => {
			clearTimeout(this.#timer);
			this.#timer = setTimeout(() => this.#sift(), SEARCH_PAUSE_MS);
		});
		$("#kinds", root).addEventListener("change", () => this.#sift());
		$("#follow", root).addEventListener("click", () => this.#follow(!this.#list.stick));
		$("#latest", root).addEventListener("click", () => this.#follow(true));
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
		for (let i = this.#shown; i < entries.length; i++)
			if (this.#fits(entries[i])) {
				this.#found.push(entries[i]);
				if (!this.#list.stick) this.#unseen++;
			}
		this.#shown = entries.length;
		this.#box.hidden = !this.#found.length;
		this.#list.grew();
		for (const each of recovered) {
			const index = this.#indexOf(each.n);
			if (index >= 0) this.#list.change(index);
		}
		this.#drawWords();
	}

	/** Moves the times on. */
	tick() {
		for (const row of this.#list.rows.values()) setText($(".rel", row), this.#ago(Number(row.dataset.at)));
	}

	print(whole) {
		this.#list.print(whole);
	}

	/** Brings an event into sight and to the reader. */
	goTo(n) {
		if (this.#indexOf(n) < 0) {
			$("#find", this.#root).value = "";
			for (const box of $$("#kinds input", this.#root)) box.checked = true;
			this.#sift();
		}
		this.#follow(false);
		this.#focus(this.#indexOf(n));
	}

	#ago(ms) {
		return `${about((this.#now() - ms) / 1000)} ago`;
	}

	#fits(each) {
		return !this.#off.has(family(each.kind)) && (!this.#sought || textOf(each).includes(this.#sought));
	}

	#sift() {
		this.#sought = $("#find", this.#root).value.trim().toLowerCase();
		this.#off = new Set($$("#kinds input:not(:checked)", this.#root).map(box => box.value));
		this.#found = this.#log.entries.filter(each => this.#fits(each));
		this.#shown = this.#log.entries.length;
		this.#at = -1;
		this.#box.hidden = !this.#found.length;
		this.#list.replace(this.#found);
		this.#drawWords();
	}

	/** The events found are in their order, so that one is found by halves. */
	#indexOf(n) {
		let low = 0,
			high = this.#found.length;
		while (low < high) {
			const middle = (low + high) >> 1;
			if (this.#found[middle].n < n) low = middle + 1;
			else high = middle;
		}
		return this.#found[low]?.n === n ? low : -1;
	}

	#drawWords() {
		const { counts, entries } = this.#log,
			root = this.#root,
			sifted = this.#sought || this.#off.size;
		for (const kind of Object.keys(FAMILIES)) setText($(`[data-kind=${kind}]`, root), number(counts[kind] ?? 0));
		setText(
			$("#events-none", root),
			this.#found.length
				? ""
				: entries.length
					? "No event is like that."
					: "Nothing yet. Events show here as they come.",
		);
		setText(
			$("#events-n", root),
			sifted
				? `${number(this.#found.length)} found`
				: entries.length
					? `${number(entries.length)}, newest at the bottom`
					: "",
		);
		setAttribute($("#follow", root), "aria-checked", `${this.#list.stick}`);
		if (this.#list.stick) this.#unseen = 0;
		$("#latest", root).hidden = !this.#unseen;
		setText($("#latest", root), `${number(this.#unseen)} new`);
	}

	#follow(yes) {
		this.#list.stick = yes;
		if (yes) this.#list.grew();
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
			inside = each.stepName && h("bdi", {}, each.stepName);
		const what = each.name ? [h("b", { dir: "auto" }, each.name), inside && h("span.k", {}, " in ", inside)] : inside;
		return h(
			each.n > this.newAfter ? "li.new" : "li",
			{ tabindex: -1, "data-sequence": each.n, "data-s": each.kind, "data-at": each.at },
			h("span.n", {}, each.n),
			icon(each.kind),
			h("div", {}, h("p", {}, h("span.k", {}, word(KIND, each.kind)), " ", what)),
			h(
				"time",
				{ datetime: iso(each.at) },
				h("span.rel", {}, this.#ago(each.at)),
				h("span.abs", {}, exact(each.at), each.occurred && ` (occurred ${exact(each.occurred)})`),
			),
			reported(each.metadata, step?.metadata),
			each.by &&
				h(
					"p.healed",
					{},
					"Recovered by ",
					h(
						"button.textual",
						{ type: "button", "data-to": each.by.n },
						each.by.n,
						" ",
						h("bdi", {}, each.by.stepName || each.by.name),
					),
					`, ${span((each.by.at - each.at) / 1000)} later`,
				),
		);
	}

	/** Rows of later events blink once. */
	newAfter = Infinity;
}

/** What a search looks through. */
const textOf = each =>
	[KIND[each.kind], each.name, each.stepName, ...Object.entries(each.metadata ?? {}).flat()].join("\n").toLowerCase();

export const eventCount = count => plural(count, "event");
