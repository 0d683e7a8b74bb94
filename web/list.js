// A list of any length of which only what is in sight stands in the document. Rows have different heights: a row counts
// with an estimate until it was in sight, and empty boxes above and below stand for the rows that are left out.

import { become } from "./dom.js";

const WHOLE = 200;
const MOST_PRINTED = 10_000;
const AROUND = 12;

/** Sums of heights, changed and searched in logarithmic time (a Fenwick tree of the differences to the estimate). */
class Heights {
	constructor(estimate) {
		this.estimate = estimate;
		this.clear(0);
	}

	clear(count) {
		this.count = count;
		this.tree = new Array(count + 1).fill(0);
		this.differences = new Array(count).fill(0);
	}

	grow(count) {
		while (this.count < count) {
			const i = ++this.count;
			this.tree[i] = this.#sum(i - 1) - this.#sum(i - (i & -i));
			this.differences.push(0);
		}
	}

	#sum(count) {
		let sum = 0;
		for (let i = count; i > 0; i -= i & -i) sum += this.tree[i];
		return sum;
	}

	/** The height of the first rows together. */
	above(count) {
		return count * this.estimate + this.#sum(count);
	}
	of(index) {
		return this.estimate + this.differences[index];
	}

	set(index, height) {
		const change = height - this.of(index);
		if (!change) return;
		this.differences[index] += change;
		for (let i = index + 1; i <= this.count; i += i & -i) this.tree[i] += change;
	}

	/** The row at this height. */
	at(y) {
		let index = 0,
			rest = y;
		for (let step = 2 ** Math.floor(Math.log2(this.count || 1)); step; step >>= 1) {
			const next = index + step;
			if (next > this.count) continue;
			const height = step * this.estimate + this.tree[next];
			if (height <= rest) {
				index = next;
				rest -= height;
			}
		}
		return Math.min(index, this.count - 1);
	}
}

export class VirtualList {
	#box;
	#make;
	#heights;
	#width = 0;
	#whole = false;
	#set = 0;
	items = [];
	/** The rows that stand in the document, by their index. */
	rows = new Map();
	/** Whether the end of the list is kept in sight. */
	stick = true;

	/** `make(item)` makes a row; `left()` is called when the reader scrolls away from the end. */
	constructor(box, estimate, make, left) {
		this.#box = box;
		this.#make = make;
		this.#heights = new Heights(estimate);
		box.addEventListener(
			"scroll",
			() => {
				// The first step of a smooth scroll may be less than a pixel.
				if (this.stick && box.scrollTop < this.#set && box.scrollHeight - box.scrollTop - box.clientHeight > 0.5)
					left();
				this.draw();
			},
			{ passive: true },
		);
		this.resize = new ResizeObserver(() => {
			if (box.clientWidth === this.#width) return this.draw();
			this.#width = box.clientWidth;
			this.#heights.clear(this.items.length);
			for (const [index, row] of this.rows) this.#measure(index, row);
			this.draw();
		});
		this.resize.observe(box);
	}

	/** Shows other items. */
	replace(items) {
		this.items = items;
		this.#drop(0, 0);
		this.#heights.clear(items.length);
		this.draw();
	}

	/** Shows an item that changed. */
	change(index) {
		const row = this.rows.get(index);
		if (!row) return;
		become(row, this.#make(this.items[index]));
		this.#measure(index, row);
		this.draw();
	}

	/** Brings an item into sight and returns its row. */
	reveal(index) {
		// The second turn knows the heights of the rows that the first one brought.
		for (let turn = 0; turn < 2; turn++) {
			const top = this.#heights.above(index),
				bottom = top + this.#heights.of(index),
				{ scrollTop, clientHeight } = this.#box;
			if (top < scrollTop) this.#box.scrollTop = top;
			else if (bottom > scrollTop + clientHeight) this.#box.scrollTop = bottom - clientHeight;
			this.draw();
		}
		return this.rows.get(index);
	}

	/** Puts every row into the document, to be printed. */
	print(whole) {
		this.#whole = whole && this.items.length <= MOST_PRINTED;
		this.draw();
	}

	/** Shows what was added to the items. */
	draw() {
		const box = this.#box,
			count = this.items.length;
		// Not in sight at all, as in an embedded page.
		if (!count || (!box.clientHeight && !box.clientWidth)) return;
		this.#heights.grow(count);
		const anchor = this.#heights.at(box.scrollTop),
			offset = box.scrollTop - this.#heights.above(anchor);
		let range;
		for (let turn = 0; turn < 4; turn++) {
			const next = this.#range(
				this.stick ? this.#heights.above(count) - box.clientHeight : this.#heights.above(anchor) + offset,
			);
			if (range && next[0] >= range[0] && next[1] <= range[1]) break;
			range = next;
			this.#place(...range);
		}
		this.#space("--above", this.#heights.above(range[0]));
		this.#space("--below", this.#heights.above(count) - this.#heights.above(range[1]));
		const top = this.stick ? box.scrollHeight - box.clientHeight : this.#heights.above(anchor) + offset;
		if (Math.abs(box.scrollTop - top) >= 1) box.scrollTop = top;
		this.#set = box.scrollTop;
		for (const row of this.rows.values()) row.ariaSetSize = count;
	}

	#space(side, height) {
		const text = `${Math.round(height * 100) / 100}px`;
		if (this.#box.style.getPropertyValue(side) !== text) this.#box.style.setProperty(side, text);
	}

	#range(top) {
		const count = this.items.length;
		if (this.#whole || count <= WHOLE) return [0, count];
		const first = this.#heights.at(Math.max(0, top)),
			last = this.#heights.at(Math.max(0, top) + this.#box.clientHeight);
		return [Math.max(0, first - AROUND), Math.min(count, last + 1 + AROUND)];
	}

	#place(first, last) {
		this.#drop(first, last);
		const fresh = [];
		let next = this.#box.firstChild;
		for (let index = first; index < last; index++) {
			const row = this.rows.get(index);
			if (row) {
				next = row.nextSibling;
				continue;
			}
			const made = this.#make(this.items[index]);
			made.ariaPosInSet = index + 1;
			this.rows.set(index, made);
			this.#box.insertBefore(made, next);
			fresh.push([index, made]);
		}
		for (const [index, row] of fresh) this.#measure(index, row);
	}

	#drop(first, last) {
		for (const [index, row] of this.rows)
			if (index < first || index >= last) {
				// The list keeps the focus of a row that goes out of sight.
				if (row.contains(document.activeElement)) this.#box.focus({ preventScroll: true });
				row.remove();
				this.rows.delete(index);
			}
	}

	#measure(index, row) {
		const { height } = row.getBoundingClientRect();
		if (height) this.#heights.set(index, height);
	}
}
