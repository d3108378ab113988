// SPDX-License-Identifier: Apache-2.0
//! Requests of a driver to a disk: image layers, scratch or volumes, as the first byte says.
#![no_main]

use bulkhead_fuzz::chains::drive;
use bulkhead_fuzz::input::Input;
use bulkhead_fuzz::places::file;
use bulkhead_vmm::devices::blk::Blk;
use bulkhead_vmm::devices::blk::disk::{ImageDisk, ScratchDisk, Volume, VolumeDisk};

const DISK_BYTES: u64 = 64 << 10;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let disk = || file(&vec![7; usize::try_from(DISK_BYTES).expect("a small disk")]);
    match input.below(3) {
        0 => {
            let scratch = disk();
            let kept = scratch.try_clone().expect("a second descriptor");
            let scratch = ScratchDisk::new(Some(scratch), DISK_BYTES);
            drive(
                &mut Blk::new(scratch, "scratch", Default::default()),
                0,
                &mut input,
                |_, _, _| (),
            );
            let bytes = kept.metadata().expect("its size").len();
            assert_eq!(bytes, DISK_BYTES, "nothing was written beyond the end");
        }
        1 => {
            let image = ImageDisk::default();
            image.append(disk(), DISK_BYTES).expect("an extent");
            let mut blk = Blk::new(image.clone(), "image", Default::default());
            drive(&mut blk, 0, &mut input, |_, _, input| {
                let len = u64::from(input.u16()) + 1;
                image.append(disk(), len).expect("another extent");
            });
        }
        _ => {
            let volumes = VolumeDisk::default();
            volumes
                .append(Volume::File(disk()), DISK_BYTES)
                .expect("a volume");
            let mut blk = Blk::new(volumes.clone(), "volumes", Default::default());
            drive(&mut blk, 0, &mut input, |_, _, input| match input.byte() {
                0 => {
                    let device = Volume::Device(disk());
                    volumes.append(device, DISK_BYTES).expect("another");
                }
                byte => drop(volumes.remove(u64::from(byte) * 8)),
            });
        }
    }
});
