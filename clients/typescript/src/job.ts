/** A job by its id, or by the id that its provider gave it, which only the provider may use. */
export type JobRef = { jobId: string } | { providerJobId: string };

/** Jobs with one key are named in the same way. */
export function keyOf(job: JobRef): string {
  const { case: kind, value } = jobOf(job);
  return `${kind} ${value}`;
}

/** The jobs that were added last. Each is known at least until `count` others were added. */
export class RecentJobs {
  readonly #count: number;
  #new = new Set<string>();
  #old = new Set<string>();

  constructor(count: number) {
    this.#count = count;
  }

  /** Returns whether the job was not known. */
  add(job: JobRef): boolean {
    const key = keyOf(job);
    const isNew = !this.#new.has(key) && !this.#old.has(key);
    this.#new.add(key);
    if (this.#new.size >= this.#count) {
      this.#old = this.#new;
      this.#new = new Set();
    }
    return isNew;
  }
}

/** The job as requests name it. */
export const jobOf = (job: JobRef) =>
  "jobId" in job
    ? ({ case: "jobId", value: job.jobId } as const)
    : ({ case: "providerJobId", value: job.providerJobId } as const);
