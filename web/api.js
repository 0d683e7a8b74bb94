// The Connect protocol over fetch: unary calls and server streams in JSON, and what their errors mean.

const TIMEOUT_MS = 15_000;
const MOST_BYTES = 64 * 1024 * 1024;
const HTTP_CODES = {
	401: "unauthenticated",
	403: "permission_denied",
	404: "unimplemented",
	429: "unavailable",
	502: "unavailable",
	503: "unavailable",
	504: "unavailable",
};

/** A call that failed: the code of Connect, the reason of milepost, and the fields at fault. */
export class ApiError extends Error {
	constructor(code, message, details = {}) {
		super(message || code);
		Object.assign(this, { code, reason: "", fields: [], retryMs: 0 }, details);
	}
	/** The credential has ended, or never was one. */
	get ended() {
		return this.code === "unauthenticated";
	}
	/** The same call may succeed later. */
	get passing() {
		return ![
			"unauthenticated",
			"permission_denied",
			"not_found",
			"invalid_argument",
			"out_of_range",
			"unimplemented",
		].includes(this.code);
	}
}

let skew = 0;

/** The server's time, which may differ from this device's. */
export const now = () => Date.now() + skew;

function learnTime(response) {
	const date = Date.parse(response.headers.get("date"));
	// The header has whole seconds: a smaller difference says nothing.
	if (date) skew = Math.abs(date - Date.now()) > 2000 ? date - Date.now() : 0;
}

/** Calls with one credential. Views keep their client, so that none of them can use the credential of another. */
export class Client {
	constructor(secret) {
		this.secret = secret;
	}

	async call(method, message = {}, signal) {
		const timeout = AbortSignal.timeout(TIMEOUT_MS);
		const response = await this.#send(
			method,
			"application/json",
			JSON.stringify(message),
			signal ? AbortSignal.any([signal, timeout]) : timeout,
		);
		try {
			return await response.json();
		} catch (error) {
			throw broken(error, signal);
		}
	}

	/** The messages of a server stream. `heard` is called whenever bytes arrive. */
	async *stream(method, message, signal, heard) {
		const response = await this.#send(method, "application/connect+json", envelope(message), signal);
		try {
			for await (const [flags, data] of envelopes(response.body.getReader(), heard)) {
				const json = JSON.parse(new TextDecoder().decode(data));
				if (!(flags & 2)) yield json;
				else if (json.error) throw refusal(json.error);
				else return;
			}
		} catch (error) {
			throw broken(error, signal);
		}
		throw new ApiError("unavailable", "The connection ended.");
	}

	async #send(method, type, body, signal) {
		const headers = { "content-type": type, "connect-protocol-version": "1" };
		if (this.secret) headers.authorization = `Bearer ${this.secret}`;
		let response;
		try {
			response = await fetch(new URL(`milepost.v1.${method}`, document.baseURI), {
				method: "POST",
				headers,
				body,
				signal,
				cache: "no-store",
				credentials: "omit",
				redirect: "error",
			});
		} catch (error) {
			throw broken(error, signal);
		}
		learnTime(response);
		if (response.ok) return response;
		const json = await response.json().catch(() => ({}));
		throw refusal({ code: HTTP_CODES[response.status] ?? "unknown", ...json });
	}
}

/** Network errors become the code that gRPC has for them. What the caller gave up passes as it is. */
function broken(error, signal) {
	if (error instanceof ApiError) return error;
	if (signal?.aborted) return signal.reason;
	return new ApiError("unavailable", "The server does not answer.");
}

function envelope(message) {
	const json = new TextEncoder().encode(JSON.stringify(message)),
		bytes = new Uint8Array(json.length + 5);
	new DataView(bytes.buffer).setUint32(1, json.length);
	bytes.set(json, 5);
	return bytes;
}

/** Cuts a body into messages. A message is valid until the next one is asked for. */
async function* envelopes(reader, heard) {
	let buffer = new Uint8Array(65536),
		start = 0,
		end = 0;
	try {
		for (;;) {
			while (end - start >= 5) {
				const size = new DataView(buffer.buffer).getUint32(start + 1),
					next = start + 5 + size;
				if (size > MOST_BYTES) throw new ApiError("resource_exhausted", "A message is too large.");
				if (end < next) break;
				const flags = buffer[start],
					data = buffer.subarray(start + 5, next);
				start = next;
				yield [flags, data];
			}
			const { done, value } = await reader.read();
			if (done) return;
			heard?.();
			if (end + value.length > buffer.length) {
				const rest = buffer.subarray(start, end);
				if (rest.length + value.length > buffer.length) buffer = new Uint8Array(2 * (rest.length + value.length));
				buffer.set(rest);
				end = rest.length;
				start = 0;
			}
			buffer.set(value, end);
			end += value.length;
		}
	} finally {
		// The stream is over for us: its connection is free for other calls.
		reader.cancel().catch(() => {});
	}
}

/** The details of an error as milepost decodes them: their fields have different names. */
function refusal({ code, message, details = [] }) {
	const {
		reason = "",
		fieldViolations: fields = [],
		retryDelay = "0s",
	} = Object.assign({}, ...details.map(({ debug }) => debug));
	return new ApiError(code, message, { reason, fields, retryMs: 1000 * parseFloat(retryDelay) });
}
