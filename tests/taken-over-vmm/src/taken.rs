// SPDX-License-Identifier: Apache-2.0
//! All attempts, one after the other, and what came of each as a line of JSON.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use bulkhead_jail::syscalls::List;
use bulkhead_vmm::config::VmConfig;
use bulkhead_vmm::control::Reply;
use bulkhead_vmm::extent::Extent;
use bulkhead_vmm::inherited::Inherited;
use bulkhead_vmm::report::{ExitReason, ExitReport};
use bulkhead_vmm::{jail, syscalls};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::attempt::Answer;
use crate::attempts;
use crate::facts::Facts;
use crate::trial;
use crate::world::{Held, World};

/// How long the test may take for its part.
const PATIENCE: Duration = Duration::from_secs(60);

/// Does its worst in the jail. The report says only whether it came to the end.
pub fn over(config: &VmConfig, mut facts: Facts) -> ExitReport {
    facts.add(&config.extra_cmdline);
    facts.memory_max_bytes = config.memory_max_bytes();
    let ended = try_all(config, &facts);
    let detail = ended.map_or_else(|e| format!("attempts: {e}"), |()| "tried".to_owned());
    ExitReport::new(ExitReason::StopRequested, detail)
}

fn try_all(config: &VmConfig, facts: &Facts) -> io::Result<()> {
    let mut console = Inherited::Console.take()?;
    let control = UnixListener::from(OwnedFd::from(Inherited::Control.take()?));
    let layer = receive_layer(&control)?;
    let mut scratch = Inherited::Scratch.take()?;
    jail::bound_files(config, scratch.seek(SeekFrom::End(0))?);
    let held = Held {
        layer: layer.as_raw_fd(),
        ..Held::inherited()
    };
    // The daemon takes what it hears for a guest that is ready, and ends the VM when no agent answers.
    for is_heard in [false, true] {
        let lists = std::iter::once(None).chain(syscalls::ALL.into_iter().map(Some));
        for list in lists {
            try_with(list, held, facts, &mut console, is_heard)?;
        }
    }
    let count = attempts::all().count();
    writeln!(
        console,
        "{{\"attempts\":{count},\"lists\":{}}}",
        syscalls::ALL.len()
    )?;
    // The test looks around, and connects when it has seen enough.
    accept(&control).map(drop)
}

fn try_with(
    list: Option<&'static List>,
    held: Held,
    facts: &Facts,
    console: &mut File,
    is_heard: bool,
) -> io::Result<()> {
    let all = attempts::all().map(|(_, attempt)| attempt);
    for attempt in all.filter(|attempt| attempt.is_heard == is_heard) {
        let outcome = trial::of(attempt, held, facts, list)?;
        let mut line = serde_json::to_vec(&outcome)?;
        line.push(b'\n');
        console.write_all(&line)?;
    }
    Ok(())
}

fn accept(control: &UnixListener) -> io::Result<UnixStream> {
    let until = std::time::Instant::now() + PATIENCE;
    control.set_nonblocking(true)?;
    loop {
        match control.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(e) if std::time::Instant::now() > until => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Receives a layer as the VMM does, and answers.
fn receive_layer(control: &UnixListener) -> io::Result<OwnedFd> {
    let mut client = accept(control)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut messages = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 1024];
    let mut into = [io::IoSliceMut::new(&mut bytes)];
    rustix::net::recvmsg(&client, &mut into, &mut messages, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = messages.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let file = files.next().and_then(|mut files| files.next());
    let extent = Extent {
        first_sector: 0,
        sectors: 1,
    };
    let mut line = serde_json::to_vec(&Reply::Extent(extent))?;
    line.push(b'\n');
    client.write_all(&line)?;
    file.ok_or_else(|| io::Error::other("the test sent no layer"))
}

/// Makes the attempts that are harmless without a jail. Prints a line for each.
pub fn outside(words: &str) -> io::Result<()> {
    let mut facts = Facts::look();
    facts.add(words);
    let world = World::real(Held::inherited(), facts, None, |_| {});
    for attempt in attempts::all().map(|(_, attempt)| attempt) {
        if attempts::OUTSIDE.contains(&attempt.name) {
            let answer = Answer::from((attempt.run)(&world)).to_string();
            let line = serde_json::json!({"attempt": attempt.name, "answer": answer});
            println!("{line}");
        }
    }
    Ok(())
}
