"""Records demo.svg, the picture in README.md.

    python3 docs/recording/record.py target/release/milepost docs/recording/demo.svg

Starts a server and `milepost demo`, kills the server (SIGKILL) while the demo's job runs, starts it
again, and writes both terminals as one animated SVG without scripts. The prompts are this program's;
everything else is what the two commands printed, at the time at which they printed it. A viewer that
shows no animation shows the finished run.
"""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from html import escape

COLUMNS, ROWS = 96, 40
CELL, LINE, MARGIN = 8.4, 19, 16
DEMO_S, KILL_AFTER_S, AWAY_S = 14, 6.0, 1.5
# The finished run is shown for so long before the recording begins, and again after its end.
SHOWN_BEFORE_S, SHOWN_AFTER_S = 2.5, 5.0
FRAME_S = 0.2

COLORS = {"31": "r", "32": "g", "33": "y", "36": "c", "38": "d"}
CSS = """text{white-space:pre;fill:#c9d1d9}.b{font-weight:700}.c{fill:#56d4dd}.g{fill:#56d364}
.r{fill:#ff7b72}.y{fill:#e3b341}.d{fill:#848d97}
g g{visibility:hidden;animation:TIMEs step-end infinite}g .last{visibility:visible}
@media(prefers-reduced-motion:reduce){g g{animation:none!important}}"""


class Terminal:
    """What a terminal shows, for the few control sequences that milepost uses."""

    def __init__(self):
        self.rows = [[(" ", "")] * COLUMNS for _ in range(ROWS)]
        self.row = self.column = 0
        self.style = ""

    def feed(self, text):
        for control, parameters, final, char in re.findall(r"(\x1b\[([\d;?]*)([A-Za-z]))|(.|\n|\r)", text):
            if control:
                self.control(parameters, final)
            elif char == "\n":
                self.row = min(self.row + 1, ROWS - 1)
            elif char == "\r":
                self.column = 0
            else:
                if self.column == COLUMNS:
                    self.row, self.column = min(self.row + 1, ROWS - 1), 0
                self.rows[self.row][self.column] = (char, self.style)
                self.column += 1

    def control(self, parameters, final):
        count = int(parameters) if parameters.isdigit() else 1
        if final == "A":
            self.row = max(self.row - count, 0)
        elif final == "B":
            self.row = min(self.row + count, ROWS - 1)
        elif final == "K":
            self.rows[self.row] = [(" ", "")] * COLUMNS
        elif final == "m" and parameters in ("", "0"):
            self.style = ""
        elif final == "m":
            code = parameters.split(";")[0]
            self.style = " ".join([self.style, {"1": "b", "2": "d"}.get(code) or COLORS.get(code, "")]).strip()

    def runs(self):
        """Each piece of text of one style, as (row, column, style, text)."""
        found = set()
        for row, cells in enumerate(self.rows):
            # The spinner and the bar of a row change apart from each other.
            pieces = re.finditer(r"(?:\S ?)*\S", "".join(char for char, _ in cells))
            for piece in pieces:
                start = piece.start()
                for column in range(piece.start(), piece.end()):
                    if column + 1 == piece.end() or cells[column + 1][1] != cells[column][1]:
                        text = "".join(char for char, _ in cells[start : column + 1])
                        if text.strip():
                            indent = len(text) - len(text.lstrip())
                            found.add((row, start + indent, cells[start][1], text.strip()))
                        start = column + 1
        return found


def start_server(milepost, data_dir):
    server = subprocess.Popen(
        [milepost, "--data-dir", data_dir, "--log-level", "error"], stdout=subprocess.PIPE, text=True
    )
    return server, server.stdout.readline().replace("\n", "\r\n")


def start_demo(milepost, data_dir):
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": ""}
        os.execve(milepost, [milepost, "demo", "--seconds", str(DEMO_S), "--data-dir", data_dir], environment)
    return terminal


def record(milepost, data_dir):
    """The frames: the time of each in seconds, and the runs of both terminals."""
    above, below = Terminal(), Terminal()
    frames = []

    def frame(since):
        frames.append((time.monotonic() - since, above.runs(), below.runs()))

    server, line = start_server(milepost, data_dir)
    above.feed(f"$ \x1b[1mmilepost\x1b[0m\r\n{line}")
    below.feed("$ \x1b[1mmilepost demo\x1b[0m\r\n")
    since = time.monotonic()
    demo = start_demo(milepost, data_dir)
    killed = started = False
    waiting = b""
    while True:
        at = time.monotonic() - since
        if not killed and at > KILL_AFTER_S:
            server.kill()
            server.wait()
            above.feed(f"$ \x1b[31mkill -9 {server.pid}\x1b[0m\r\n")
            killed = True
        if not started and at > KILL_AFTER_S + AWAY_S:
            above.feed("$ \x1b[1mmilepost\x1b[0m\r\n")
            frame(since)
            server = subprocess.Popen(server.args, stdout=subprocess.PIPE, text=True)
            started = True
        if select.select([server.stdout], [], [], 0)[0] and (line := server.stdout.readline()):
            above.feed(line.replace("\n", "\r\n"))
        if select.select([demo], [], [], FRAME_S)[0]:
            try:
                waiting += os.read(demo, 65536)
            except OSError:  # The demo has ended.
                break
            text = waiting.decode(errors="ignore")
            waiting = waiting[len(text.encode()) :]
            below.feed(text)
        # A line is drawn in several writes.
        drawn = not select.select([demo], [], [], 0.02)[0]
        if drawn and (not frames or time.monotonic() - since - frames[-1][0] > FRAME_S):
            frame(since)
    frame(since)
    server.send_signal(signal.SIGTERM)
    server.wait()
    return frames


def svg(frames):
    end = frames[-1][0]
    total = SHOWN_BEFORE_S + end + SHOWN_AFTER_S
    split = 1 + max(row for row, *_ in frames[-1][1])
    times = [SHOWN_BEFORE_S + at for at, *_ in frames] + [total]
    shown = {}
    for index, (_, above, below) in enumerate(frames):
        for pane, runs in enumerate((above, below)):
            for run in runs:
                shown.setdefault((pane, run), []).append(index)
    # Runs that are shown in the same frames are one group.
    groups = {}
    for run, indexes in shown.items():
        groups.setdefault(tuple(indexes), []).append(run)

    drawn, rules = [], [CSS.replace("TIME", f"{total:.1f}")]
    for number, (indexes, runs) in enumerate(sorted(groups.items())):
        last = indexes[-1] == len(frames) - 1
        steps = [(0.0, last), (SHOWN_BEFORE_S, 0 in indexes)]
        for index in range(1, len(frames)):
            if (index in indexes) != steps[-1][1]:
                steps.append((times[index], index in indexes))
        steps = [step for i, step in enumerate(steps) if i == 0 or step[1] != steps[i - 1][1]]
        always = len(steps) == 1
        if not always:
            keys = "".join(
                f"{100 * at / total:.4g}%{{visibility:{'visible' if on else 'hidden'}}}" for at, on in steps
            )
            rules.append(f"@keyframes k{number}{{{keys}}}#k{number}{{animation-name:k{number}}}")
        texts = "".join(draw(pane, run, split) for pane, run in sorted(runs))
        tag = f"<g id='k{number}'" + (" class='last'" if last else "") if not always else "<g class='last'"
        drawn.append(f"{tag}>{texts}</g>")
    height = MARGIN * 2 + LINE * (split + 2 + max(row for row, *_ in frames[-1][2]) + 1)
    width = round(MARGIN * 2 + COLUMNS * CELL)
    line = round(MARGIN + LINE * (split + 0.6))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        "role='img' font-family='ui-monospace,SFMono-Regular,Menlo,Consolas,monospace' font-size='14'>"
        "<title>A job followed in the terminal, while its server is killed and started again</title>"
        f"<style>{''.join(rules)}</style>"
        f"<rect width='{width}' height='{height}' rx='8' fill='#0d1117'/>"
        f"<path d='M0 {line}H{width}' stroke='#30363d'/><g>{''.join(drawn)}</g></svg>\n"
    )


def draw(pane, run, split):
    row, column, style, text = run
    y = MARGIN + LINE * (row + 0.75 + (split + 1 if pane else 0))
    # Fonts differ in the width of their characters.
    width = f" textLength='{len(text) * CELL:.4g}' lengthAdjust='spacingAndGlyphs'" if len(text) > 1 else ""
    kind = f" class='{style}'" if style else ""
    return f"<text x='{MARGIN + column * CELL:.4g}' y='{y:.4g}'{width}{kind}>{escape(text, quote=False)}</text>"


def main():
    milepost, target = sys.argv[1:]
    data_dir = tempfile.mkdtemp(prefix="milepost-")
    # Started by root, Postgres runs as another user.
    os.chmod(data_dir, 0o755)
    try:
        frames = record(os.path.abspath(milepost), data_dir)
    finally:
        shutil.rmtree(data_dir)
    with open(target, "w", encoding="utf-8") as file:
        file.write(svg(frames))


if __name__ == "__main__":
    main()
