// Makes and changes elements. Every value becomes text or an attribute, never markup: the policy of the page forbids
// markup from strings, and style attributes too, so that widths are set as custom properties by CSSOM.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/**
 * An element. `name` is a tag with classes, as in `p.plate`. A plain object before the children has its properties:
 * functions are event handlers, `vars` are custom properties, what is false or absent is left out. So are children that
 * are false or absent.
 */
export function h(name, ...children) {
	const props = children[0]?.constructor === Object ? children.shift() : {};
	const [tag, ...classes] = name.split(".");
	const element = document.createElement(tag);
	if (classes.length) element.className = classes.join(" ");
	for (const [key, value] of Object.entries(props)) {
		if (key === "vars") for (const [name, each] of Object.entries(value)) element.style.setProperty(name, each);
		else if (typeof value === "function") element.addEventListener(key, value);
		else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
	}
	element.append(...present(children));
	return element;
}

const present = children => children.flat(3).filter(child => child != null && child !== false && child !== "");

const template = id => document.getElementById(id).content.cloneNode(true);

/** Shows a template of index.html as the view. */
export function show(id, title) {
	$("#main").replaceChildren(template(id));
	document.title = `${title} – milepost`;
}

/** Shows a dialog of a template. It ends when it is closed, and with the view. */
export function openDialog(id) {
	document.body.append(template(id));
	const dialog = document.body.lastElementChild;
	dialog.prepend(
		h(
			"form.dhead",
			{ method: "dialog" },
			h("h2", dialog.ariaLabel),
			h("button.square", { "aria-label": "Close" }, "✕"),
		),
	);
	dialog.addEventListener("close", () => dialog.remove());
	addEventListener("hashchange", () => dialog.remove(), { once: true });
	dialog.showModal();
	return dialog;
}

/** A name and what stands for it, for a `dl`. */
export const fact = (name, ...values) =>
	h(
		"div",
		h("dt", name),
		values.map(value => h("dd", value)),
	);

/** What an act returns, or undefined where it is refused, as storage is in frames of other sites. */
export function attempt(act) {
	try {
		return act();
	} catch {
		return undefined;
	}
}

/** Sets text only where it changed, so that nothing is spoken or laid out again without a reason. */
export function setText(element, text) {
	if (element.textContent !== `${text}`) element.textContent = text;
}

export function setAttribute(element, name, value) {
	if (value == null || value === false) element.removeAttribute(name);
	else if (element.getAttribute(name) !== `${value}`) element.setAttribute(name, value);
}

/** Makes an element like another one in place: a fill in it moves, and the focus and a selection stay. */
export function become(element, like) {
	for (const { name, value } of like.attributes) if (name !== "style") setAttribute(element, name, value);
	for (const name of like.style) element.style.setProperty(name, like.style.getPropertyValue(name));
	const before = [...element.childNodes];
	for (const next of [...like.childNodes]) {
		const node = before.shift();
		if (!node) element.append(next);
		else if (node.nodeName !== next.nodeName || node.className !== next.className) node.replaceWith(next);
		else if (next.data) setText(node, next.data);
		else become(node, next);
	}
	for (const node of before) node.remove();
}

const keys = new WeakMap();

/** Replaces the children of an element when `key` changed since the last time. */
export function fill(element, key, children) {
	const text = JSON.stringify(key);
	if (keys.get(element) === text) return false;
	keys.set(element, text);
	element.replaceChildren(...present([children()]));
	return true;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
	const element = document.createElementNS(SVG, name);
	for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
	element.append(...present(children));
	return element;
}

const RING = "M3 8a5 5 0 1 0 10 0A5 5 0 1 0 3 8",
	BAN = `${RING}M4.4 11.6l7.2-7.2`,
	BANG = "M8 2v7.5M8 11.5v2",
	CROSS = "M4 4l8 8M12 4l-8 8";

// A line and, after the bar, a filled shape.
const ICONS = {
	pending: RING,
	running: `${RING}|M5.6 8a2.4 2.4 0 1 0 4.8 0 2.4 2.4 0 1 0-4.8 0`,
	stalled: `${RING}M6.5 6v4M9.5 6v4`,
	failed: CROSS,
	complete: "M2.5 8.5 6.2 12 13.5 4",
	cancelled: BAN,
	step: "|M4 4h8v8H4z",
	progress: "M4 4h8v8H4z|M4 4h4v8H4z",
	info: "M4 8h8",
	error: CROSS,
	close: BAN,
	silent: "|M2 7h2v2H2zM7 7h2v2H7zM12 7h2v2h-2z",
	cancellation_requested: BANG,
	look: BANG,
	live: "|M4 8a4 4 0 1 0 8 0 4 4 0 1 0-8 0",
	catching: "M4 3l4 4 4-4M4 9l4 4 4-4",
	offline: "M1.5 8H6M10 8h4.5M7 12l2-8",
	paged: "M3 4h10M3 8h10M3 12h6",
	copy: "M6 6h7v7H6zM3 10V3h7",
	out: "M6 4h6v6M12 4l-8 8",
	auto: `${RING}|M8 3v10a5 5 0 0 0 0-10Z`,
	dark: "|M10.5 2.5a6 6 0 1 0 3 8.2 5 5 0 0 1-3-8.2Z",
	light: "M5 8a3 3 0 1 0 6 0 3 3 0 1 0-6 0M8 1v2M8 13v2M1 8h2M13 8h2M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1",
};

export function icon(name) {
	const [line, shape = ""] = (ICONS[name] ?? "").split("|");
	return svg(
		"svg",
		{ class: "i", viewBox: "0 0 16 16", "aria-hidden": "true" },
		svg("path", { d: line }),
		svg("path", { class: "f", d: shape }),
	);
}

/** Shows a secret that no later call returns, ready to be copied, behind the form that asked for it. */
export function reveal(form, what, secret) {
	$(".secret")?.remove();
	const field = h("input", { id: "secret", readonly: true, value: secret });
	form.after(
		h(
			"div.secret",
			h("label", `${what} Copy it now: it is not shown again.`, field),
			h("button.main", { click: event => copy(secret, event.currentTarget, field) }, "Copy"),
		),
	);
	field.focus();
	field.select();
}

/** Copies a text. Where the browser refuses the clipboard, as without encryption, it leaves the text selected. */
export async function copy(text, button, field) {
	try {
		await navigator.clipboard.writeText(text);
	} catch {
		field?.select();
		return;
	}
	const before = [...button.childNodes];
	button.replaceChildren(icon("complete"));
	setTimeout(() => button.replaceChildren(...before), 1500);
}

/** What others wrote is a link only where it is an absolute http or https URL. */
export function link(text) {
	if (typeof text !== "string" || !/^https?:\/\//i.test(text)) return null;
	return URL.canParse(text) ? new URL(text).href : null;
}

export const outside = { rel: "noopener noreferrer", target: "_blank" };
