// SPDX-License-Identifier: Apache-2.0
//! Tests of records on disks that are full or broken.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use redb::StorageBackend;
use redb::backends::FileBackend;

use super::*;

const TABLE: Table = Table::new("table");
const OTHER: Table = Table::new("other");

thread_local! {
    static DISK: RefCell<Option<Disk>> = const { RefCell::new(None) };
}

/// How the disk of this test's thread is.
#[derive(Clone)]
enum Disk {
    Broken,
    /// Full as long as this file exists.
    FullBeside(PathBuf),
}

fn set(disk: Option<Disk>) {
    DISK.with_borrow_mut(|now| *now = disk);
}

/// A file on such a disk.
#[derive(Debug)]
struct OnDisk(FileBackend);

impl StorageBackend for OnDisk {
    fn len(&self) -> Result<u64, io::Error> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.0.read(offset, out)
    }

    fn set_len(&self, bytes: u64) -> Result<(), io::Error> {
        self.0.set_len(bytes)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        match DISK.with_borrow(Clone::clone) {
            Some(Disk::Broken) => Err(io::Error::from_raw_os_error(5)),
            Some(Disk::FullBeside(file)) if file.exists() => Err(io::ErrorKind::StorageFull.into()),
            _ => self.0.write(offset, data),
        }
    }
}

struct Fixture {
    records: Records,
    place: Place,
    _directory: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let place = Place {
        path: directory.path().join("records.redb"),
        reserve: directory.path().join("reserve"),
        tables: &[TABLE, OTHER],
    };
    let open = |path: &Path| {
        let file = fs::File::options().read(true).write(true).open(path)?;
        let backend = OnDisk(FileBackend::new(file)?);
        Database::builder().create_with_backend(backend)
    };
    Fixture {
        records: Records::open_with(place.clone(), open).unwrap(),
        place,
        _directory: directory,
    }
}

impl Fixture {
    fn put(&self, room: Room, key: &str, value: i32) -> Result<(), RecordsError> {
        self.records
            .change(room, |change| change.put(TABLE, key, &value))
    }

    fn values(&self) -> Vec<i32> {
        let all = self.records.all::<i32>(TABLE).unwrap();
        all.into_iter().map(|(_, value)| value.unwrap()).collect()
    }
}

#[test]
fn records_survive_a_reopen_and_tables_do_not_mix() {
    let fixture = fixture();
    for (key, value) in [("a", 1), ("a", 2), ("b", 3)] {
        fixture.put(Room::Free, key, value).unwrap();
    }
    let removed = |key| {
        let remove = |change: &Change<'_>| change.remove(TABLE, key);
        fixture.records.change(Room::Free, remove).unwrap()
    };
    assert!(removed("b"));
    assert!(!removed("never there"));
    let other = |change: &Change<'_>| change.put(OTHER, "a", &4);
    fixture.records.change(Room::Free, other).unwrap();
    let place = fixture.place.clone();
    drop(fixture.records);
    let records = Records::open(place).unwrap();
    assert_eq!(records.get::<i32>(TABLE, "a").unwrap(), Some(2));
    assert_eq!(records.get::<i32>(TABLE, "b").unwrap(), None);
    assert_eq!(records.get::<i32>(OTHER, "a").unwrap(), Some(4));
}

#[test]
fn a_broken_disk_fails_a_change_and_not_those_after_it() {
    let fixture = fixture();
    fixture.put(Room::Free, "a", 1).unwrap();
    set(Some(Disk::Broken));
    for room in [Room::Free, Room::Reserve] {
        let error = fixture.put(room, "b", 2).unwrap_err();
        assert!(error.io().is_some() && !error.is_full(), "{error:?}");
    }
    set(None);
    assert!(
        fixture.place.reserve.exists(),
        "the reserve is for full disks"
    );
    assert_eq!(fixture.values(), [1]);
    fixture.put(Room::Free, "b", 2).unwrap();
    assert_eq!(fixture.values(), [1, 2]);
}

#[test]
fn only_what_may_take_the_reserve_is_written_on_a_full_disk() {
    let fixture = fixture();
    fixture.put(Room::Free, "a", 1).unwrap();
    set(Some(Disk::FullBeside(fixture.place.reserve.clone())));
    let error = fixture.put(Room::Free, "b", 2).unwrap_err();
    assert!(error.is_full(), "{error:?}");
    assert!(fixture.place.reserve.exists());
    fixture.put(Room::Reserve, "c", 3).unwrap();
    assert!(!fixture.place.reserve.exists());
    set(None);
    assert_eq!(fixture.values(), [1, 3]);
    fixture.records.fill_reserve();
    assert!(fixture.place.reserve.exists());
}

#[test]
fn a_change_that_fails_changes_nothing() {
    let fixture = fixture();
    let half = |change: &Change<'_>| {
        change.put(TABLE, "a", &1)?;
        change.put(TABLE, "b", &f64::NAN)?;
        change.get::<bool>(TABLE, "a").map(drop)
    };
    let error = fixture.records.change(Room::Free, half).unwrap_err();
    assert!(matches!(error, RecordsError::Decode { .. }), "{error:?}");
    assert!(fixture.values().is_empty());
}

#[test]
fn a_record_of_another_form_is_named_and_hides_no_other() {
    let fixture = fixture();
    fixture.put(Room::Free, "plain", 7).unwrap();
    let odd = |change: &Change<'_>| change.put(TABLE, "odd", &"text");
    fixture.records.change(Room::Free, odd).unwrap();
    let rows = fixture.records.all::<i32>(TABLE).unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|(key, row)| (key.as_str(), row.is_ok()))
        .collect();
    assert_eq!(names, [("odd", false), ("plain", true)]);
    assert!(rows[0].1.as_ref().unwrap_err().to_string().contains("odd"));
}

#[test]
fn changes_at_the_same_time_are_all_kept() {
    let fixture = fixture();
    let records = &fixture.records;
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let add = |change: &Change<'_>| {
                    let value = change.get::<i32>(TABLE, "sum")?.unwrap_or_default();
                    change.put(TABLE, "sum", &(value + 1))
                };
                records.change(Room::Free, add).unwrap();
            });
        }
    });
    assert_eq!(fixture.values(), [16]);
}

#[test]
fn the_file_is_for_its_owner_whatever_it_was_before() {
    let fixture = fixture();
    let place = fixture.place.clone();
    drop(fixture.records);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.reserve), 0o600);
    assert_eq!(mode(&place.path), 0o600);
    fs::set_permissions(&place.path, fs::Permissions::from_mode(0o644)).unwrap();
    let records = Records::open(place.clone()).unwrap();
    assert_eq!(mode(&place.path), 0o600);
    let second = Records::open(place.clone()).unwrap_err();
    assert!(matches!(second, RecordsError::InUse { .. }), "{second:?}");
    drop(records);
}
