// SPDX-License-Identifier: Apache-2.0
//! What a VM is restored from: the files of a checkpoint. [`crate::control::checkpoint`] has them written.
//!
//! Nobody writes to these files. The VMM either copies the memory, which takes as long as the disk takes to read that, and
//! the VM needs the files only until it runs; or it maps the memory, which many VMs share then, and of which each reads what
//! it uses. What was on the image disk is not in a checkpoint: the caller has the same files, and [`attach`] puts them where
//! they were before the guest goes on.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

pub use bulkhead_vmm::config::KernelSum;
use bulkhead_vmm::control::{Client, ClientError};
use sha2::{Digest, Sha256};

use crate::control::{self, ControlError, Extent};

const READ_BYTES: usize = 256 << 10;

/// Why a VM is not restored.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error("pass the files of a checkpoint to the VMM")]
    Files(#[source] io::Error),
    #[error("give the restored VM its layers")]
    Control(#[from] ControlError),
    #[error(
        "layer {number} of the restored VM is at {found}, and its guest knows it at {expected}"
    )]
    Place {
        /// Its place among the layers, from 1.
        number: usize,
        found: Place,
        expected: Place,
    },
    #[error("this VM is restored from a checkpoint and cannot boot")]
    Layers,
    #[error("this VM is not restored from a checkpoint")]
    None,
}

/// Where a layer is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(Extent);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Extent {
            first_sector,
            sectors,
        } = self.0;
        write!(f, "sector {first_sector} with {sectors} sectors")
    }
}

/// The files of a checkpoint. Both are regular, open for reading only, and at their starts.
#[derive(Debug)]
pub struct Saved {
    /// The sum of the guest's kernel, see [`kernel_sum`].
    pub kernel_sum: KernelSum,
    pub memory: File,
    pub state: File,
    /// Whether the VM maps the memory instead of copying it. The file stays as it is then as long as that VM runs; it may
    /// be unlinked.
    pub maps_memory: bool,
}

impl Saved {
    /// Memory and state, for the VMM.
    pub(crate) fn for_vmm(&self) -> Result<(OwnedFd, OwnedFd), SavedError> {
        let both = || {
            Ok((
                self.memory.try_clone()?.into(),
                self.state.try_clone()?.into(),
            ))
        };
        both().map_err(SavedError::Files)
    }
}

/// The sum of a guest's kernel, by which a state is known to be of that kernel. Blocks while it reads the file.
pub fn kernel_sum(path: &Path) -> io::Result<KernelSum> {
    let (mut file, mut sum) = (File::open(path)?, Sha256::new());
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(sum.finalize().into()),
            Ok(count) => sum.update(buffer.get(..count).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Attaches the layers of a restored VM in order, each of which must come to be where the guest knows it, and lets the guest
/// go on. The VMM answers as soon as it has its memory, and copies it perhaps, so all of it may take as long as `limit`.
pub(crate) async fn attach(
    socket: &Path,
    layers: Vec<(File, Extent)>,
    limit: Duration,
) -> Result<(), SavedError> {
    let socket = socket.to_owned();
    let work = move || {
        let mut client = Client::connect(&socket)?.with_limit(limit);
        attach_and_resume(&mut client, &layers)
    };
    control::on_thread("restore", limit, work).await?
}

fn attach_and_resume(
    client: &mut Client,
    layers: &[(File, Extent)],
) -> Result<Result<(), SavedError>, ClientError> {
    for (number, (file, expected)) in (1..).zip(layers) {
        let found = client.attach_extent(file)?;
        if found != *expected {
            let (found, expected) = (Place(found), Place(*expected));
            return Ok(Err(SavedError::Place {
                number,
                found,
                expected,
            }));
        }
    }
    client.resume()?;
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::*;

    const FIRST: Extent = Extent {
        first_sector: 64,
        sectors: 8,
    };
    const SECOND: Extent = Extent {
        first_sector: 72,
        sectors: 16,
    };

    /// A VMM that puts layers at these places. Returns what it was asked.
    fn vmm(directory: &tempfile::TempDir, places: Vec<Extent>) -> JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(directory.path().join("control")).unwrap();
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let lines = BufReader::new(socket.try_clone().unwrap()).lines();
            let mut places = places.into_iter();
            let mut asked = Vec::new();
            for line in lines.map_while(Result::ok) {
                let reply = match line.contains("attach_extent") {
                    true => {
                        let place = places.next().unwrap();
                        let (first, sectors) = (place.first_sector, place.sectors);
                        format!(
                            r#"{{"reply":"extent","first_sector":{first},"sectors":{sectors}}}"#
                        )
                    }
                    false => r#"{"reply":"done"}"#.to_owned(),
                };
                asked.push(line);
                writeln!(socket, "{reply}").unwrap();
            }
            asked
        })
    }

    fn layers(places: &[Extent]) -> Vec<(File, Extent)> {
        let layer = |place: &Extent| (tempfile::tempfile().unwrap(), *place);
        places.iter().map(layer).collect()
    }

    const LIMIT: Duration = Duration::from_secs(30);
    const ATTACH: &str = r#"{"request":"attach_extent"}"#;
    const RESUME: &str = r#"{"request":"resume"}"#;

    #[tokio::test]
    async fn layers_are_attached_in_order_before_the_guest_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let vmm = vmm(&directory, vec![FIRST, SECOND]);
        let socket = directory.path().join("control");
        attach(&socket, layers(&[FIRST, SECOND]), LIMIT)
            .await
            .unwrap();
        assert_eq!(vmm.join().unwrap(), [ATTACH, ATTACH, RESUME]);
    }

    #[tokio::test]
    async fn a_guest_whose_layer_is_elsewhere_does_not_go_on() {
        let directory = tempfile::tempdir().unwrap();
        let vmm = vmm(&directory, vec![FIRST, SECOND]);
        let socket = directory.path().join("control");
        let error = attach(&socket, layers(&[FIRST, FIRST]), LIMIT).await;
        assert_eq!(
            error.unwrap_err().to_string(),
            "layer 2 of the restored VM is at sector 72 with 16 sectors, and its guest knows it at sector 64 with 8 sectors"
        );
        assert_eq!(vmm.join().unwrap(), [ATTACH, ATTACH]);
    }

    #[tokio::test]
    async fn a_vmm_that_does_not_answer_is_waited_for_as_long_as_the_limit_says() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = attach(&socket, layers(&[]), Duration::from_millis(50)).await;
        assert!(matches!(error, Err(SavedError::Control(_))), "{error:?}");
    }

    #[test]
    fn a_kernel_has_the_sum_of_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        assert!(kernel_sum(&kernel).is_err());
        std::fs::write(&kernel, "abc").unwrap();
        assert_eq!(kernel_sum(&kernel).unwrap()[..4], [0xba, 0x78, 0x16, 0xbf]);
    }
}
