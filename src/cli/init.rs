//! milepost as PID 1 of a container without an init.
//!
//! The kernel makes PID 1 the parent of every process whose own parent has ended, such
//! as the child processes of a killed Postgres. Such a process stays a zombie until
//! PID 1 waits for it. Therefore PID 1 runs the command in a second process, and itself
//! waits for processes and forwards signals. The command's own code then waits for its
//! own children only.

use std::{
    env, io,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use futures_util::future::select_all;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use tokio::{
    runtime,
    signal::unix::{self, SignalKind, signal},
};

/// The signals that are forwarded to the command.
const FORWARDED: [Signal; 6] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// Runs this program with the same arguments in a second process. Returns its exit code;
/// after a signal, 128 and the signal's number.
pub fn run_as_init() -> io::Result<ExitCode> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let _context = runtime.enter();
    // Before the command starts, so that no signal and no end of a process is missed.
    let mut ended = signal(SignalKind::child())?;
    let mut signals = Vec::new();
    for forwarded in FORWARDED {
        signals.push((forwarded, signal(SignalKind::from_raw(forwarded.as_raw()))?));
    }
    let mut arguments = env::args_os();
    let mut command = Command::new(env::current_exe()?);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let command = Pid::from_child(&command.args(arguments).spawn()?);
    runtime.block_on(async {
        loop {
            while let Some((pid, status)) = wait(WaitOptions::NOHANG)? {
                if pid == command {
                    return Ok(exit_code(status));
                }
            }
            tokio::select! {
                _ = ended.recv() => {}
                // Until `wait` has returned the command, the id is its own.
                received = next(&mut signals) => kill_process(command, received)?,
            }
        }
    })
}

/// The next signal to forward.
async fn next(signals: &mut [(Signal, unix::Signal)]) -> Signal {
    let receive = signals.iter_mut().map(|(forwarded, signal)| {
        Box::pin(async move {
            signal.recv().await;
            *forwarded
        })
    });
    select_all(receive).await.0
}

fn exit_code(status: WaitStatus) -> ExitCode {
    let signalled = || status.terminating_signal().map(|signal| signal + 128);
    let code = status.exit_status().or_else(signalled).and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}
