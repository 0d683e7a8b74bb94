// The jobs that the filters ask for, as a file of comma-separated values. An export that breaks off is resumed.

import { h } from "./dom.js";
import { fullName, plain } from "./words.js";

const ATTEMPTS = 5;
const PAUSE_MS = 2000;

const COLUMNS = {
	job_id: job => job.id,
	provider_job_id: job => job.providerJobId,
	provider_job_name: job => job.providerJobName,
	status: job => plain("JOB_STATUS_", job.status),
	percent: job => job.progress?.percent ?? 0,
	last_sequence: job => job.lastSequence ?? 0,
	created_at: job => job.createdAt,
	closed_at: job => job.closedAt,
	provider_id: job => job.provider.id,
	provider: job => fullName(job.provider),
	customer_id: job => job.customer.id,
	customer: job => fullName(job.customer),
	configuration_tag: job => job.configurationTag,
	configuration_version: job => job.configurationVersion,
	labels: job => (job.labels ? JSON.stringify(job.labels) : ""),
};

/** Quoted; what a spreadsheet would run as a formula gets an apostrophe before it. */
function cell(value) {
	const text = `${value ?? ""}`;
	return `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
}

const line = cells => `${cells.map(cell).join()}\r\n`;

/** Reads all that matches. */
async function read(client, filter, signal) {
	const lines = [line(Object.keys(COLUMNS))];
	let resumeToken = "";
	for (let attempt = 0; ; attempt++) {
		try {
			for await (const message of client.stream("JobService/ExportJobs", { filter, resumeToken }, signal)) {
				for (const job of message.jobs?.jobs ?? []) lines.push(line(Object.values(COLUMNS).map(of => of(job))));
				if (message.end) return lines;
				resumeToken = message.resumeToken;
				attempt = 0;
			}
		} catch (error) {
			if (signal.aborted || !error.passing || attempt >= ATTEMPTS) throw error;
			await new Promise(resolve => setTimeout(resolve, PAUSE_MS));
		}
	}
}

/** Saves the jobs that match. */
export async function download(client, filter, signal) {
	const lines = await read(client, filter, signal),
		href = URL.createObjectURL(new Blob(lines, { type: "text/csv;charset=utf-8" }));
	h("a", { href, download: `jobs-${new Date().toISOString().slice(0, 10)}.csv` }).click();
	setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
