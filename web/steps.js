// The gauge and the table of steps: the same states twice, once as one bar and once in words.

import { $, fill, h, link, outside, setAttribute, setText, svg } from "./dom.js";
import { clock, iso, minutes, number, percent, span } from "./words.js";

const WORDS = {
	done: "Done",
	healed: "Done after an error",
	failed: "Failed",
	todo: "To come",
	skipped: "Not reported",
};
const inWords = (state, step) => WORDS[state] ?? (step.begun ? "Left" : "Never begun");

/** What an event reports: declared names first, in their order and with their units. */
export function reported(metadata, declared = []) {
	if (!metadata) return null;
	const units = new Map(declared.map(each => [each.name, each.units ?? ""]));
	const names = [
		...declared.map(each => each.name).filter(name => name in metadata),
		...Object.keys(metadata).filter(name => !units.has(name)),
	];
	return h(
		"dl.md",
		{},
		names.map(name => {
			const value = metadata[name],
				href = link(value);
			return h(
				"div",
				{},
				h("dt", { dir: "auto" }, name),
				typeof value === "number"
					? [h("dd", {}, number(value)), h("dd", { dir: "auto" }, units.get(name))]
					: h(
							"dd.t",
							{ dir: "auto" },
							href ? h("a", { href, ...outside }, value.replace(/^https?:\/\//i, "")) : `${value}`,
						),
			);
		}),
	);
}

export class Steps {
	#root;
	#log;
	#bar;
	#rows = [];
	#pointed;

	constructor(root, log) {
		this.#root = root;
		this.#log = log;
		this.#bar = $("#bar", root);
		const steps = log.configured;
		const share = points => (100 * points) / (log.total || 1);
		for (const step of steps) {
			const mark = h("i.mark");
			const segment = h(
				"div.seg",
				{
					vars: {
						"--x": `${share(step.from)}%`,
						"--w": `${share(step.points)}%`,
						"--gap": step.from + step.points < log.total ? "2px" : "0px",
					},
				},
				mark,
				h("b", {}, step.n),
			);
			const row = h("tr", { "data-step": step.tag });
			for (const element of [segment, row]) {
				element.addEventListener("pointerenter", () => this.#point(step.tag));
				element.addEventListener("pointerleave", () => this.#point(null));
			}
			this.#bar.append(segment);
			$("#steps", root).append(row);
			this.#rows.push({ tag: step.tag, segment, mark, row, ...this.#cells(row, step, share(step.points)) });
		}
		if (!steps.length)
			this.#bar.append(
				h("div.seg", { vars: { "--x": "0%", "--w": "100%", "--gap": "0px" } }, h("i.mark", { "data-s": "todo" })),
			);
		$(".steps table", root).hidden = !steps.length;
		$(".steps .none", root).hidden = steps.length > 0;
		this.#scale();
	}

	#cells(row, step, share) {
		const shares = percent(number(+share.toFixed(share < 10 ? 1 : 0)));
		const square = h("i.mark"),
			state = h("small"),
			done = h("td.c-t"),
			took = h("td.c-d"),
			bar = h("i"),
			error = h("i", { "data-s": "error", hidden: true }),
			md = h("td.c-md");
		row.append(
			h("td.c-n", {}, h("b", {}, step.n), square),
			h("td.c-name", {}, h("bdi", {}, step.name), " ", state),
			h("td.c-w", {}, shares),
			done,
			took,
			h("td.c-wf", { "aria-hidden": "true" }, bar, error),
			md,
		);
		return { square, state, done, took, bar, error, md, shares, points: step.points, declared: step.metadata };
	}

	#scale() {
		const marks = Array.from({ length: 21 }, (_, i) => {
			const x = `${i * 5}%`,
				long = i % 5 === 0;
			const line = svg("line", { x1: x, x2: x, y2: long ? 11 : i % 2 ? 4 : 7 });
			return long
				? [line, svg("text", { x, y: 25, "text-anchor": i === 0 ? "start" : i === 20 ? "end" : "middle" }, `${i * 5}`)]
				: line;
		});
		$("#scale", this.#root).append(
			...marks.flat(),
			svg("svg", { id: "needle", overflow: "visible" }, svg("path", { d: "M-6 9 0 1 6 9Z" })),
		);
	}

	#point(tag) {
		this.#pointed = tag;
		this.draw();
	}

	/** Shows the present state; `now` is the server's time. */
	draw(now = this.#now) {
		this.#now = now;
		const log = this.#log,
			{ status, percent: value } = log.state,
			from = log.first?.at,
			to = Math.max(log.closedAt ?? now, (from ?? 0) + 1);
		const place = ms => (100 * Math.min(1, Math.max(0, (ms - from) / (to - from)))).toFixed(1);
		for (const each of this.#rows) this.#drawRow(each, log.steps.get(each.tag), place);
		setText($("#percent", this.#root), value);
		setAttribute(this.#bar, "aria-valuenow", value);
		setAttribute(this.#bar, "aria-valuetext", `${value} percent, ${log.stepsDone} of ${log.steps.size} steps done`);
		setAttribute($("#needle", this.#root), "x", `${value}%`);
		setText($("#steps-n", this.#root), this.#rows.length ? `${log.stepsDone} of ${this.#rows.length} done` : "");
		setText($("#axis", this.#root), from ? minutes(from) + (log.closedAt ? `–${minutes(to)}` : "") : "");
		this.#drawReadout(status);
	}

	#now = 0;

	#drawRow(each, step, place) {
		const state = this.#log.stateOf(step),
			on = this.#pointed === each.tag;
		for (const element of [each.row, each.mark, each.square, each.bar]) setAttribute(element, "data-s", state);
		for (const element of [each.row, each.segment]) element.classList.toggle("on", on);
		setText(each.state, inWords(state, step));
		each.state.classList.toggle("vh", state === "done" || state === "todo");
		const end = step.done?.at,
			begun = step.begun && step.begun !== step.done ? step.begun.at : undefined;
		fill(each.done, end ?? 0, () => end && h("time", { datetime: iso(end) }, clock(end)));
		// How long a step took is known only where an earlier event named it.
		setText(each.took, end && begun ? span((end - begun) / 1000) : "");
		each.bar.hidden = !end;
		if (end) {
			each.bar.style.setProperty("--x", `${place(begun ?? end)}%`);
			each.bar.style.setProperty("--w", `${place(end) - place(begun ?? end)}%`);
		}
		each.error.hidden = !step.error;
		if (step.error) each.error.style.setProperty("--x", `${place(step.error.at)}%`);
		fill(each.md, step.done?.n ?? 0, () => reported(step.done?.metadata, each.declared));
	}

	/** The step under the pointer, the one that failed, or how many are done. */
	#drawReadout(status) {
		const log = this.#log,
			steps = [...log.steps.values()],
			readout = $("#readout", this.#root);
		const step =
			log.steps.get(this.#pointed) ?? (status === "failed" ? steps.find(each => log.stateOf(each) === "failed") : null);
		if (step) {
			const state = log.stateOf(step),
				{ shares, points } = this.#rows[step.n - 1];
			fill(readout, [step.tag, state, step.done?.n], () => [
				h("strong", {}, `${step.n}\u00a0 `, h("bdi", {}, step.name)),
				` · ${inWords(state, step)} · weighs ${shares}, ${number(points)} of ${number(log.total)} points${step.done ? ` · done ${clock(step.done.at)}` : ""}`,
			]);
			return;
		}
		const latest = steps.filter(each => each.done).sort((a, b) => b.done.n - a.done.n)[0];
		const text = !steps.length
			? "No steps to weigh."
			: log.state.sequence
				? `${log.stepsDone} of ${steps.length} steps done.`
				: "No event yet. The bar fills as steps are done.";
		fill(readout, [text, latest?.tag], () =>
			latest
				? [
						`${text} Latest: `,
						h("strong", {}, `${latest.n}\u00a0 `, h("bdi", {}, latest.name)),
						` at ${clock(latest.done.at)}`,
					]
				: text,
		);
	}
}
