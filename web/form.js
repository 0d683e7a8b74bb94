// Forms: one call at a time, and what was refused stands beside its field.

import { $, $$, h, setAttribute, setText } from "./dom.js";

let count = 0;

/** Calls `act` with the form's elements when it is sent, and shows what it throws. */
export function submit(form, act) {
	const plate = h("p.plate", { "data-s": "failed", role: "alert", hidden: true });
	form.prepend(plate);
	form.addEventListener("submit", async event => {
		event.preventDefault();
		const button = $("button", form);
		clear(form, plate);
		button.disabled = true;
		try {
			await act(form.elements);
		} catch (error) {
			show(form, plate, error);
		} finally {
			button.disabled = false;
		}
	});
}

function clear(form, plate) {
	plate.hidden = true;
	plate.removeAttribute("data-done");
	for (const each of $$(".wrong", form)) each.remove();
	for (const each of $$("[aria-invalid]", form)) {
		setAttribute(each, "aria-invalid", null);
		setAttribute(each, "aria-describedby", null);
	}
}

function show(form, plate, error) {
	let first = null;
	for (const { field, description } of error.fields ?? []) {
		const input = form.elements[field];
		if (!(input instanceof HTMLElement)) continue;
		const id = `wrong-${++count}`;
		input.closest("label").append(h("small.wrong", { id }, description));
		setAttribute(input, "aria-invalid", "true");
		setAttribute(input, "aria-describedby", id);
		first ??= input;
	}
	if (first) return first.focus();
	setAttribute(plate, "data-s", "failed");
	setText(plate, error.message);
	plate.hidden = false;
}

/** Says in the form that it was done. */
export function done(form, text) {
	const plate = $(".plate", form);
	setAttribute(plate, "data-s", "info");
	setText(plate, text);
	plate.hidden = false;
}
