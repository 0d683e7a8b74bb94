// The gauge and the table of steps: the same states twice, once as one bar and once in words.

import { $, fill, h, link, outside, setAttribute, setText, svg } from "./dom.js";
import { clock, iso, minutes, number, percent, span } from "./words.js";

const WORDS = {
	done: "Done",
	healed: "Done after an error",
	now: "Under way",
	stalled: "Silent",
	failed: "Failed",
	todo: "To come",
	skipped: "Not reported",
};
/** The percent of a step that was begun and is not done. */
const part = (state, step) => (state === "skipped" ? 0 : Math.max(0, step.percent % 100));
const inWords = (state, step, filled = part(state, step)) =>
	(WORDS[state] ?? (step.percent < 0 ? "Never begun" : "Left")) + (filled ? `, ${percent(filled)}` : "");
const title = step => h("strong", `${step.n}\u00a0 `, h("bdi", step.name));

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
		names.map(name => {
			const value = metadata[name],
				href = link(value);
			return h(
				"div",
				h("dt", { dir: "auto" }, name),
				typeof value === "number"
					? [h("dd", number(value)), h("dd", { dir: "auto" }, units.get(name))]
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
	#log;
	#bar;
	#rows = [];
	#pointed;

	constructor(log) {
		this.#log = log;
		this.#bar = $("#bar");
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
				h("b", step.n),
			);
			const row = h("tr", { "data-step": step.tag });
			for (const element of [segment, row]) {
				element.addEventListener("pointerenter", () => this.#point(step.tag));
				element.addEventListener("pointerleave", () => this.#point(null));
			}
			this.#bar.append(segment);
			$("#steps").append(row);
			this.#rows.push({ tag: step.tag, segment, mark, row, ...this.#cells(row, step, share(step.points)) });
		}
		if (!steps.length)
			this.#bar.append(
				h("div.seg", { vars: { "--x": "0%", "--w": "100%", "--gap": "0px" } }, h("i.mark", { "data-s": "todo" })),
			);
		$(".steps table").hidden = !steps.length;
		$(".steps .none").hidden = steps.length > 0;
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
			h("td.c-n", h("b", step.n), square),
			h("td.c-name", h("bdi", step.name), " ", state),
			h("td.c-w", shares),
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
		$("#scale").append(
			...marks.flat(),
			svg("svg", { id: "needle", overflow: "visible" }, svg("path", { d: "M-6 9 0 1 6 9Z" })),
		);
	}

	#point(tag) {
		this.#pointed = tag;
		this.draw();
	}

	/** Shows the present state; `now` is the server's time, `ahead` the estimate, if there is one. */
	draw(now = this.#now, ahead = this.#ahead) {
		this.#now = now;
		this.#ahead = ahead;
		const log = this.#log,
			value = log.state.percent,
			steps = [...log.steps.values()],
			find = state => steps.find(each => log.stateOf(each) === state),
			present = find("failed") ?? find("stalled") ?? find("now"),
			from = log.first?.at,
			// Of an estimate the clock has room for the name of its end, too.
			end = ahead ? from + (ahead.p90 - from) * 1.1 : 0,
			to = Math.max(log.closedAt ?? now, end, (from ?? 0) + 1);
		const place = ms => (100 * Math.min(1, Math.max(0, (ms - from) / (to - from)))).toFixed(1);
		for (const each of this.#rows) this.#drawRow(each, log.steps.get(each.tag), place);
		const table = $(".steps table");
		table.classList.toggle("ahead", ahead !== null);
		for (const name in ahead) table.style.setProperty(`--${name}`, `${place(ahead[name])}%`);
		setText($("#percent"), value);
		setAttribute(this.#bar, "aria-valuenow", value);
		setAttribute(
			this.#bar,
			"aria-valuetext",
			`${value} percent, ${log.stepsDone} of ${steps.length} steps done${present ? `. ${present.name}: ${inWords(log.stateOf(present), present)}` : ""}`,
		);
		setAttribute($("#needle"), "x", `${value}%`);
		setText($("#steps-n"), this.#rows.length ? `${log.stepsDone} of ${this.#rows.length} done` : "");
		setText($("#axis"), from ? minutes(from) + (log.closedAt ? `–${minutes(to)}` : "") : "");
		this.#drawReadout(steps, log.steps.get(this.#pointed) ?? present);
	}

	#now = 0;
	#ahead = null;

	#drawRow(each, step, place) {
		const state = this.#log.stateOf(step),
			on = this.#pointed === each.tag;
		for (const element of [each.row, each.mark, each.square, each.bar]) setAttribute(element, "data-s", state);
		for (const element of [each.row, each.segment]) element.classList.toggle("on", on);
		const filled = `${part(state, step)}%`;
		if (each.filled !== filled)
			for (const element of [each.mark, each.square]) element.style.setProperty("--part", (each.filled = filled));
		setText(each.state, inWords(state, step));
		each.state.classList.toggle("vh", state === "done" || state === "todo");
		const end = step.done?.at,
			begun = step.begun && step.begun !== step.done ? step.begun.at : undefined,
			until = end ?? (begun && (this.#log.closedAt ?? this.#now));
		fill(each.done, end ?? 0, () => end && h("time", { datetime: iso(end) }, clock(end)));
		// How long a step took is known only where an event named it before it was done.
		setText(each.took, begun ? span(until - begun) : "");
		each.bar.hidden = !until;
		if (until) {
			each.bar.style.setProperty("--x", `${place(begun ?? until)}%`);
			each.bar.style.setProperty("--w", `${place(until) - place(begun ?? until)}%`);
		}
		each.error.hidden = !step.error;
		if (step.error) each.error.style.setProperty("--x", `${place(step.error.at)}%`);
		fill(each.md, step.done?.n ?? 0, () => reported(step.done?.metadata, each.declared));
	}

	/** The step under the pointer, the one that failed or is under way, or how many are done. */
	#drawReadout(steps, step) {
		const log = this.#log,
			readout = $("#readout");
		if (step) {
			const { shares, points } = this.#rows[step.n - 1],
				{ begun, done } = step,
				at = (word, event) => (event ? ` · ${word} ${clock(event.at)}` : "");
			const text = ` · ${inWords(log.stateOf(step), step)} · weighs ${shares}, ${number(points)} of ${number(log.total)} points${at("begun", begun !== done && begun)}${at("done", done)}`;
			fill(readout, [step.tag, text], () => [title(step), text]);
			return;
		}
		const latest = steps.filter(each => each.done).sort((a, b) => b.done.n - a.done.n)[0];
		const text = !steps.length
			? "No steps to weigh."
			: log.state.sequence
				? `${log.stepsDone} of ${steps.length} steps done.`
				: "No event yet. The bar fills as steps are done.";
		fill(readout, [text, latest?.tag], () =>
			latest ? [`${text} Latest: `, title(latest), ` at ${clock(latest.done.at)}`] : text,
		);
	}
}
