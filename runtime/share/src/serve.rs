// SPDX-License-Identifier: Apache-2.0
//! The workers of a file server: each reads a request from the VMM's socket, lets fuse-backend-rs serve it,
//! and writes the reply. A request is a copy in the server's memory, which the guest cannot change.
//!
//! fuse-backend-rs expects messages as descriptor chains. So each worker has its own memory with a virtqueue
//! of one chain: one buffer for the request, one for the reply.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, ReadVolatile, WriteVolatile};

use super::fuse::{MOST_BYTES, REPLY_HEADER, REQUEST_HEADER, UNANSWERED, failure};
use super::idmap;
use super::syscalls;
use super::tree::Tree;

/// How many requests are served at once. Each may wait for a slow disk.
const WORKERS: u8 = 4;
const STACK_BYTES: usize = 512 << 10;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const REPLY: u64 = 0x1000;
const REQUEST: u64 = 0x20_0000;
const MEMORY_BYTES: usize = 0x40_0000;

/// Where the started workers wait until the process is confined.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Barrier>);

impl Gate {
    fn new() -> Self {
        Self(Arc::new(Barrier::new(usize::from(WORKERS) + 1)))
    }

    /// Waits until every worker has made the system calls that a thread makes at its start.
    pub fn wait(&self) {
        self.0.wait();
    }

    pub fn open(&self) {
        self.0.wait();
    }

    fn pass(&self) {
        self.0.wait();
        self.0.wait();
    }
}

/// The socket. One worker at a time reads from it, and one writes to it.
struct Line {
    input: Mutex<UnixStream>,
    output: Mutex<UnixStream>,
}

/// Starts the workers. The first one that finds that the VMM has gone ends the process.
pub fn start(socket: &UnixStream, tree: &Arc<Tree>) -> io::Result<Gate> {
    let gate = Gate::new();
    let line = Arc::new(Line {
        input: Mutex::new(socket.try_clone()?),
        output: Mutex::new(socket.try_clone()?),
    });
    let server = Arc::new(Server::new(Arc::clone(tree)));
    for number in 0..WORKERS {
        let mut desk = Desk::new()?;
        let (gate, line, server) = (gate.clone(), Arc::clone(&line), Arc::clone(&server));
        let builder = std::thread::Builder::new().name(format!("start {number}"));
        builder.stack_size(STACK_BYTES).spawn(move || {
            if let Err(e) = bulkhead_jail::syscalls::name(&syscalls::SERVER, Some(number)) {
                eprintln!("bulkhead-vmm share: {e}");
                std::process::exit(1);
            }
            gate.pass();
            let end = loop {
                if let Err(e) = turn(&line, &server, &mut desk) {
                    break e;
                }
            };
            // The usual end: the VMM has closed the socket.
            let usual = end.kind() == io::ErrorKind::UnexpectedEof;
            if !usual {
                eprintln!("bulkhead-vmm share: {end}");
            }
            std::process::exit(i32::from(!usual));
        })?;
    }
    Ok(gate)
}

fn turn<F: FileSystem + Sync>(line: &Line, server: &Server<F>, desk: &mut Desk) -> io::Result<()> {
    let len = {
        let mut input = line.input.lock().unwrap_or_else(PoisonError::into_inner);
        desk.receive(&mut input)?
    };
    let Some(len) = desk.serve(server, len)? else {
        return Ok(());
    };
    let mut output = line.output.lock().unwrap_or_else(PoisonError::into_inner);
    let sent = desk.send(&mut output, len);
    if sent.is_err() {
        let _ = output.shutdown(Shutdown::Both);
    }
    sent
}

/// The memory and the virtqueue of one worker.
pub(super) struct Desk {
    memory: GuestMemoryMmap<()>,
    queue: Queue,
    offered: u16,
}

impl Desk {
    pub(super) fn new() -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
        let mut queue = Queue::new(2).map_err(io::Error::other)?;
        let low = |address: u64| u32::try_from(address).ok();
        queue.set_desc_table_address(low(TABLE), Some(0));
        queue.set_avail_ring_address(low(AVAILABLE), Some(0));
        queue.set_used_ring_address(low(USED), Some(0));
        queue.set_ready(true);
        Ok(Self {
            memory: memory.map_err(io::Error::other)?,
            queue,
            offered: 0,
        })
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) -> io::Result<()> {
        let put = self.memory.write_obj(value, GuestAddress(address));
        put.map_err(io::Error::other)
    }

    /// Reads one request: first four bytes, which are its length, then the rest.
    fn receive(&self, input: &mut UnixStream) -> io::Result<usize> {
        self.fill(input, REQUEST, 4)?;
        let len: Result<u32, _> = self.memory.read_obj(GuestAddress(REQUEST));
        let len = usize::try_from(len.map_err(io::Error::other)?).unwrap_or(usize::MAX);
        if !(REQUEST_HEADER..=MOST_BYTES).contains(&len) {
            return Err(io::Error::other(format!(
                "request of {len} bytes is too short or too long"
            )));
        }
        self.fill(input, REQUEST + 4, len - 4)?;
        Ok(len)
    }

    fn fill(&self, input: &mut UnixStream, at: u64, len: usize) -> io::Result<()> {
        let slice = self.memory.get_slice(GuestAddress(at), len);
        let mut slice = slice.map_err(io::Error::other)?;
        input.read_exact_volatile(&mut slice).map_err(gone)
    }

    /// Sends the reply, which has `len` bytes.
    fn send(&self, output: &mut UnixStream, len: usize) -> io::Result<()> {
        let slice = self.memory.get_slice(GuestAddress(REPLY), len);
        let slice = slice.map_err(io::Error::other)?;
        output.write_all_volatile(&slice).map_err(gone)
    }

    /// Serves the request of `len` bytes. Returns the length of the reply, if there is one.
    fn serve<F: FileSystem + Sync>(
        &mut self,
        server: &Server<F>,
        len: usize,
    ) -> io::Result<Option<usize>> {
        let bad = io::Error::other::<vm_memory::GuestMemoryError>;
        let opcode: u32 = self
            .memory
            .read_obj(GuestAddress(REQUEST + 4))
            .map_err(bad)?;
        let unique: u64 = self
            .memory
            .read_obj(GuestAddress(REQUEST + 8))
            .map_err(bad)?;
        // Clear the place of the reply, so that an old reply cannot pass for a new one.
        self.put(REPLY, [0u8; REPLY_HEADER])?;
        let served = self.hand_over(server, len)?;
        if UNANSWERED.contains(&opcode) {
            return Ok(None);
        }
        let said: u32 = self.memory.read_obj(GuestAddress(REPLY)).map_err(bad)?;
        let said = usize::try_from(said).unwrap_or(usize::MAX);
        if (REPLY_HEADER..=MOST_BYTES).contains(&said) {
            if opcode == idmap::INIT && len >= idmap::REQUEST_BYTES && said >= idmap::REPLY_BYTES {
                self.allow_idmap()?;
            }
            return Ok(Some(said));
        }
        // The library does not reply to a request that it cannot parse.
        let errno = if served { libc::EIO } else { libc::EINVAL };
        self.put(REPLY, failure(unique, errno))?;
        Ok(Some(REPLY_HEADER))
    }

    /// Adds the flag of idmapped mounts to the library's reply. Both messages are long enough.
    fn allow_idmap(&self) -> io::Result<()> {
        let bad = io::Error::other::<vm_memory::GuestMemoryError>;
        let (mut request, mut reply) = ([0; idmap::REQUEST_BYTES], [0; idmap::REPLY_BYTES]);
        let memory = &self.memory;
        memory
            .read_slice(&mut request, GuestAddress(REQUEST))
            .map_err(bad)?;
        memory
            .read_slice(&mut reply, GuestAddress(REPLY))
            .map_err(bad)?;
        idmap::agree(&request, &mut reply);
        memory.write_slice(&reply, GuestAddress(REPLY)).map_err(bad)
    }

    /// Gives the library a chain of the request and the buffer for its reply. False: it could not parse the request.
    fn hand_over<F: FileSystem + Sync>(
        &mut self,
        server: &Server<F>,
        len: usize,
    ) -> io::Result<bool> {
        let length = |len: usize| u32::try_from(len).map_err(io::Error::other);
        self.put(TABLE, Descriptor::new(REQUEST, length(len)?, F_NEXT, 1))?;
        let room = Descriptor::new(REPLY, length(MOST_BYTES)?, F_WRITE, 0);
        self.put(TABLE + 16, room)?;
        // The ring's entries are all 0, which is the index of the chain's first descriptor.
        self.offered = self.offered.wrapping_add(1);
        self.put(AVAILABLE + 2, self.offered)?;
        let chain = self
            .queue
            .iter(&self.memory)
            .map_err(io::Error::other)?
            .next();
        let chain = chain.ok_or_else(|| io::Error::other("the worker's queue is empty"))?;
        let reader = Reader::from_descriptor_chain(&self.memory, chain.clone());
        let reader = reader.map_err(|e| io::Error::other(e.to_string()))?;
        let writer = VirtioFsWriter::new(&self.memory, chain);
        let writer = writer.map_err(|e| io::Error::other(e.to_string()))?;
        Ok(server
            .handle_message(reader, writer.into(), None, None)
            .is_ok())
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Desk {
    /// The reply to a request that did not come by a socket. `None` if it has none.
    pub(super) fn answer<F: FileSystem + Sync>(
        &mut self,
        server: &Server<F>,
        request: &[u8],
    ) -> io::Result<Option<Vec<u8>>> {
        let bad = io::Error::other::<vm_memory::GuestMemoryError>;
        self.memory
            .write_slice(request, GuestAddress(REQUEST))
            .map_err(bad)?;
        let Some(len) = self.serve(server, request.len())? else {
            return Ok(None);
        };
        let mut reply = vec![0; len];
        self.memory
            .read_slice(&mut reply, GuestAddress(REPLY))
            .map_err(bad)?;
        Ok(Some(reply))
    }
}

/// A socket between two processes of one machine fails only if the other process has ended.
fn gone(_error: vm_memory::VolatileMemoryError) -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

#[cfg(test)]
mod tests;
