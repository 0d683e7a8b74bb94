// A made-up job: an analysis of a CT scan, as a provider reports it.

export const STEPS = [
  ["Receive series", 4],
  ["Remove identity", 3],
  ["Resample", 6],
  ["Denoise", 8],
  ["Register to atlas", 12],
  ["Segment lungs", 14],
  ["Segment lobes", 10],
  ["Segment vessels", 12],
  ["Find nodules", 14],
  ["Measure nodules", 6],
  ["Emphysema index", 4],
  ["Check quality", 3],
  ["Write report", 4],
  ["Archive copy", 0],
].map(([name, points], i) => ({ tag: `s${i + 1}`, name, points, metadata: DECLARED(i + 1) }));

function DECLARED(n) {
  const number = (name, units = "") => ({ name, kind: "METADATA_KIND_NUMBER", units });
  return (
    {
      1: [number("Slices"), number("Size", "MB")],
      3: [number("Spacing", "mm")],
      5: [number("Residual error", "mm"), number("Iterations")],
      6: [number("Lung volume", "mL"), number("Mean density", "HU"), { name: "Mask", kind: "METADATA_KIND_LINK" }],
      8: [number("Vessel volume", "mL")],
    }[n] ?? []
  );
}

const REPORTS = {
  1: { Slices: 412, Size: 214.6 },
  2: { "Tags removed": 37 },
  3: { Spacing: 0.7 },
  5: { "Residual error": 1.82, Iterations: 240 },
  6: { "Lung volume": 4812.5, "Mean density": -812, Mask: "https://files.northlight.example/4711/lungs.nrrd" },
  7: { "Left upper": 1204.1, "Left lower": 1031.6 },
  8: { "Vessel volume": 187.3 },
  12: { Verdict: "good" },
};

/** The events of the first steps; with `trouble`, the fifth step fails once and recovers. */
export function story(steps, { trouble = false } = {}) {
  const events = [];
  for (let n = 1; n <= steps; n++) {
    const stepTag = `s${n}`;
    if (n === 5 && trouble)
      events.push(
        {
          kind: "error",
          name: "Did not converge: residual error above 5 mm",
          stepTag,
          metadata: { "Residual error": 6.31 },
        },
        { kind: "info", name: "Trying again with a coarser grid", stepTag },
      );
    if (n === 6) events.push({ kind: "info", name: "Using model lung-seg 4.2", stepTag });
    events.push({ kind: "step", stepTag, ...(REPORTS[n] && { metadata: REPORTS[n] }) });
  }
  if (steps === STEPS.length)
    events.push({
      kind: "complete",
      name: "Report is ready for review",
      metadata: { Report: "https://files.northlight.example/4711/report.pdf" },
    });
  return events;
}
