// The month: how many jobs were created on each day of it, by status, as bars and as a table.

import { $, fill, h, svg, setText } from "./dom.js";
import { number, plain, plural, word } from "./words.js";

// The statuses of a bar, from the ground up.
const ORDER = ["complete", "running", "stalled", "failed", "cancelled", "pending"];
const GROUND = 124;
const LEFT = 4;

const shift = (month, by) => new Date(month.getFullYear(), month.getMonth() + by);
const keyOf = month => `${month.getFullYear()}-${`${month.getMonth() + 1}`.padStart(2, "0")}`;
const nameOf = month => month.toLocaleDateString("en-GB", { month: "long", year: "numeric" });

const sum = numbers => numbers.reduce((sum, each) => sum + each, 0);

/** A step of the scale of which few reach up to the highest bar. */
function scaleOf(most) {
	const power = 10 ** Math.floor(Math.log10(Math.max(most, 1)));
	const step = [1, 2, 5, 10].map(factor => (factor * power) / 2).find(step => most / step <= 4 && step >= 1) ?? power;
	return [0, 1, 2, 3, 4].map(factor => factor * step).filter(value => value === 0 || value <= most);
}

export class Month {
	#summarize;
	#month;
	#asked = 0;

	/** `summarize(from, before, timeZone)` returns groups by day; `moved` is called when the reader turns to another month. */
	constructor(key, summarize, moved) {
		const [year, month] = /^\d{4}-\d\d$/.test(key) ? key.split("-") : [];
		this.#month = year ? new Date(year, month - 1) : shift(new Date(), 0);
		this.#summarize = summarize;
		for (const [id, by] of [
			["#before", -1],
			["#after", 1],
		])
			$(id).addEventListener("click", () => {
				this.#month = shift(this.#month, by);
				moved();
				this.read();
			});
	}

	/** What the address says of the month: nothing of the present one. */
	get key() {
		const key = keyOf(this.#month);
		return key === keyOf(new Date()) ? "" : key;
	}

	/** Counts again. What was drawn stays where that fails, for the next time. */
	async read() {
		const asked = ++this.#asked,
			month = this.#month,
			timeZone = Intl.DateTimeFormat().resolvedOptions().timeZone;
		let groups;
		try {
			groups = await this.#summarize(month.toISOString(), shift(month, 1).toISOString(), timeZone);
		} catch {
			return;
		}
		if (asked !== this.#asked || !$("#plot")) return;
		const last = new Date(month.getFullYear(), month.getMonth() + 1, 0),
			days = Array.from({ length: last.getDate() }, () => ({}));
		for (const { periodStart, figures } of groups) {
			// A day may begin later than at midnight, where the clocks go forward then.
			const day = days[new Date(periodStart).getDate() - 1];
			for (const { status, jobs } of figures.statuses ?? []) day[plain("JOB_STATUS_", status)] = Number(jobs);
		}
		this.#draw(month, days);
	}

	#draw(month, days) {
		const totals = days.map(day => sum(Object.values(day))),
			most = Math.max(...totals),
			scale = scaleOf(most),
			height = value => (value * (GROUND - 6)) / Math.max(most, 1),
			width = (100 - LEFT) / days.length,
			title = nameOf(month);
		const said = ORDER.map(status => [sum(days.map(day => day[status] ?? 0)), status]).filter(([jobs]) => jobs);
		setText($("#month"), title);
		setText(
			$("#month-n"),
			[plural(sum(totals), "job"), ...said.map(([jobs, status]) => `${number(jobs)} ${status}`)].join(", "),
		);
		$("#after").disabled = keyOf(month) >= keyOf(new Date());
		fill($("#plot"), [title, days], () => [
			scale.map(value => [
				svg("line", { x1: `${LEFT}%`, x2: "100%", y1: GROUND - height(value), y2: GROUND - height(value) }),
				svg("text", { y: GROUND + 4 - height(value) }, number(value)),
			]),
			days.map((day, i) => {
				const x = LEFT + width * i,
					parts = ORDER.filter(status => day[status]);
				let below = 0;
				return svg(
					"g",
					{},
					svg("title", {}, `${i + 1} ${title}: ${parts.map(status => `${number(day[status])} ${status}`).join(", ") || "no job"}`),
					parts.map(status => {
						below += day[status];
						return svg("rect", {
							"data-s": status,
							x: `${x + width * 0.14}%`,
							width: `${width * 0.72}%`,
							y: GROUND - height(below),
							height: Math.max(height(day[status]) - (below > day[status] ? 1 : 0), 1),
						});
					}),
					(i % 5 === 4 || !i) && svg("text", { x: `${x + width / 2}%`, y: 144, "text-anchor": "middle" }, i + 1),
				);
			}),
		]);
		fill($("#plot-t"), [title, days], () => [
			h("thead", h("tr", h("th", "Day"), ORDER.map(status => h("th", word(status))))),
			h(
				"tbody",
				days.map((day, i) =>
					h(
						"tr",
						h("th", { scope: "row" }, `${i + 1} ${title.slice(0, 3)}`),
						ORDER.map(status => h("td", day[status] ? number(day[status]) : "–")),
					),
				),
			),
		]);
	}
}

