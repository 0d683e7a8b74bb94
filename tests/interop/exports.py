"""Reads exported files back, with Python's csv, pandas and DuckDB, and compares them.

    python exports.py FOLDER

FOLDER has events.csv, events.jsonl, jobs.csv and jobs.jsonl of one user. The name of an event
is its sequence, or a text that a spreadsheet would run or that needs quotes.
"""

import csv
import json
import sys
from pathlib import Path

import duckdb
import pandas

FOLDER = Path(sys.argv[1])
TEXTS = {"=1+1", "-2", 'a "quoted", text\nof two lines', "Ünïcode 🧠", "'single", "0012"}


def harmless(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def main() -> None:
    events = lines("events.jsonl")
    assert len(events) > 0 and {row["event"].get("name", "") for row in events} >= TEXTS
    with (FOLDER / "events.csv").open(encoding="utf-8", newline="") as file:
        content = file.read()
        assert content.count("\r\n") == len(events) + 1, "RFC 4180 ends each record with CR LF"
        file.seek(0)
        rows = list(csv.DictReader(file, strict=True))
    assert len(rows) == len(events)
    for row, line in zip(rows, events, strict=True):
        event, job = line["event"], line["job"]
        assert row["event_id"] == event["id"] and row["sequence"] == event["sequence"]
        assert row["name"] == harmless(event.get("name", ""))
        assert row["kind"] == event["kind"].removeprefix("EVENT_KIND_").lower()
        assert row["percent"] == str(event["progress"].get("percent", 0))
        assert json.loads(row["metadata"] or "{}") == event.get("metadata", {})
        assert row["job_id"] == event["jobId"] == job["id"]
        assert row["customer_id"] == job["customer"]["id"]
        assert row["configuration_version"] == job["configurationVersion"]
        assert json.loads(row["labels"] or "{}") == job.get("labels", {})

    frame = pandas.read_csv(
        FOLDER / "events.csv", dtype={"name": str}, keep_default_na=False, parse_dates=["created_at"]
    )
    assert frame["name"].tolist() == [row["name"] for row in rows]
    assert frame["sequence"].sum() == sum(int(row["sequence"]) for row in rows)
    assert str(frame["created_at"].dtype).endswith("UTC]"), frame["created_at"].dtype

    def query(sql: str) -> list[tuple]:
        return duckdb.sql(sql.replace("FOLDER", str(FOLDER))).fetchall()

    by_job = "SELECT job_id::VARCHAR, count(*), max(sequence) FROM 'FOLDER/events.csv' GROUP BY 1 ORDER BY 1"
    expected = frame.groupby("job_id")["sequence"].agg(["count", "max"]).sort_index()
    assert query(by_job) == [(job, int(row["count"]), int(row["max"])) for job, row in expected.iterrows()]
    times = query("SELECT count(*), min(created_at) <= max(created_at) FROM 'FOLDER/events.csv'")
    assert times == [(len(rows), True)]
    of_lines = query("SELECT count(*), count(DISTINCT event.id) FROM 'FOLDER/events.jsonl'")
    assert of_lines == [(len(rows), len(rows))]

    jobs = lines("jobs.jsonl")
    with (FOLDER / "jobs.csv").open(encoding="utf-8", newline="") as file:
        job_rows = list(csv.DictReader(file, strict=True))
    assert [row["job_id"] for row in job_rows] == [job["id"] for job in jobs]
    for row, job in zip(job_rows, jobs, strict=True):
        assert row["last_sequence"] == job.get("lastSequence", "0")
        assert row["provider_job_name"] == harmless(job.get("providerJobName", ""))
    assert len(pandas.read_csv(FOLDER / "jobs.csv")) == len(jobs)
    assert query("SELECT count(*) FROM 'FOLDER/jobs.csv'") == [(len(jobs),)]
    print(f"{len(rows)} events and {len(jobs)} jobs are read back")


if __name__ == "__main__":
    main()
