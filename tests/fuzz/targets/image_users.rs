// SPDX-License-Identifier: Apache-2.0
//! The user databases of an image: `passwd`, `group`, and the user that its configuration names. NUL bytes divide them.
#![no_main]

use bulkhead_agent::fuzzing::user::resolve;
use bulkhead_proto::agent::User;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let [name, passwd, group] = [(); 3].map(|()| parts.next().unwrap_or_default());
    let user = User {
        name: String::from_utf8_lossy(name).into_owned(),
        ..User::default()
    };
    if let Ok(found) = resolve(&user, passwd, group) {
        assert_ne!(
            (found.uid, found.gid),
            (u32::MAX, u32::MAX),
            "ids that mean no change"
        );
        assert_eq!(found.groups.first(), Some(&found.gid));
        let mut groups = found.groups.clone();
        groups.sort_unstable();
        groups.dedup();
        assert_eq!(groups.len(), found.groups.len(), "a group twice");
    }
});
