// SPDX-License-Identifier: Apache-2.0
//! What the host's kernel does against side channels between guests, and against a VMM that its guest has taken over.
//!
//! None of this keeps pods from running, so nothing here is a failure. All of it is read from files below one directory,
//! so that tests can show other hosts.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bulkhead_host::cores::{self, Cores, Support};
use bulkhead_text::Problem;

use super::finding::Finding;

const FLAWS: &str = "sys/devices/system/cpu/vulnerabilities";
const NOT_AFFECTED: &str = "Not affected";

/// Looks at this host.
pub fn look(cores: Cores) -> Vec<Finding> {
    look_below(Path::new("/"), cores, cores::support())
}

fn look_below(root: &Path, cores: Cores, support: Support) -> Vec<Finding> {
    let host = Files(root);
    let flaws = host.flaws();
    vec![
        cpu_flaws(&flaws),
        smt(&flaws, cores, support),
        kvm_settings(&host, &flaws),
        ksm(&host),
        core_pattern(&host),
        ptrace(&host),
        user_namespaces(&host),
        landlock(&host),
    ]
}

/// The files of a host.
struct Files<'a>(&'a Path);

impl Files<'_> {
    /// A file's text without white space around it. `None` if it cannot be read.
    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.0.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// What the kernel says of each flaw of CPUs that it knows.
    fn flaws(&self) -> BTreeMap<String, String> {
        let entries = fs::read_dir(self.0.join(FLAWS)).into_iter().flatten();
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let read = |name: String| Some((name.clone(), self.read(&format!("{FLAWS}/{name}"))?));
        names.filter_map(read).collect()
    }
}

fn cpu_flaws(flaws: &BTreeMap<String, String>) -> Finding {
    let name = "cpu flaws";
    if flaws.is_empty() {
        return Finding::info(name, format!("this kernel does not list them in /{FLAWS}"));
    }
    let open: Vec<String> = flaws
        .iter()
        // "KVM: Vulnerable" stands in one of them.
        .filter(|(_, text)| text.trim_start_matches("KVM: ").starts_with("Vulnerable"))
        .map(|(flaw, text)| format!("{flaw} ({text})"))
        .collect();
    if open.is_empty() {
        let mitigated = flaws.values().filter(|text| *text != NOT_AFFECTED).count();
        let known = flaws.len();
        return Finding::fine(
            name,
            format!("of {known} known ones this CPU has {mitigated}, all mitigated"),
        );
    }
    Finding::warn(
        name,
        Problem::new(
            format!("not mitigated: {}", open.join(", ")),
            "update the kernel and the CPU's microcode; remove mitigations=off or the like from the kernel's command line",
        ),
    )
}

/// SMT, and what core scheduling does or would add.
fn smt(flaws: &BTreeMap<String, String>, cores: Cores, support: Support) -> Finding {
    let name = "smt";
    let shared = match (support, cores) {
        (Support::NoSmt, _) => {
            return Finding::fine(
                name,
                "not active: no two VMs run on one CPU core at the same time",
            );
        }
        (Support::Works, Cores::OwnForEachVm) => {
            return Finding::fine(
                name,
                "active, and core scheduling keeps other VMs off the cores of each",
            );
        }
        (Support::Works | Support::Missing, _) => {
            "active: two VMs can run on one CPU core at the same time"
        }
    };
    let leaks: Vec<&str> = flaws
        .iter()
        .filter(|(_, text)| text.contains("SMT vulnerable"))
        .map(|(flaw, _)| flaw.as_str())
        .collect();
    let cause = match leaks.as_slice() {
        [] => shared.to_owned(),
        leaks => format!("{shared}, and then this CPU leaks: {}", leaks.join(", ")),
    };
    let remedy = match support {
        Support::Missing => {
            "turn SMT off (nosmt on the kernel's command line); this kernel has no core scheduling (CONFIG_SCHED_CORE)"
        }
        _ => {
            "set sandbox.core_scheduling = true, or turn SMT off (nosmt on the kernel's command line)"
        }
    };
    Finding::warn(name, Problem::new(cause, remedy))
}

/// Parameters of KVM's modules that take protection away.
fn kvm_settings(host: &Files<'_>, flaws: &BTreeMap<String, String>) -> Finding {
    let name = "kvm options";
    let has = |flaw: &str| flaws.get(flaw).is_some_and(|text| text != NOT_AFFECTED);
    let off: &[&str] = &["N", "0", "never", "off"];
    let on: &[&str] = &["Y", "1"];
    // The module and its parameter, the values that are bad, and whether they matter on this CPU.
    let table: [(&str, &str, &[&str], bool, &str); 7] = [
        (
            "kvm",
            "nx_huge_pages",
            off,
            has("itlb_multihit"),
            "a guest can stop this CPU (iTLB multihit)",
        ),
        // Whether a CPU needs it is not told anywhere, so it is only shown.
        ("kvm", "mitigate_smt_rsb", &[], false, ""),
        (
            "kvm",
            "ignore_msrs",
            on,
            true,
            "unknown registers read as zero",
        ),
        (
            "kvm",
            "enable_vmware_backdoor",
            on,
            true,
            "guests reach one more interface",
        ),
        (
            "kvm_intel",
            "vmentry_l1d_flush",
            off,
            has("l1tf"),
            "a guest can read the host's L1 cache (L1TF)",
        ),
        (
            "kvm_intel",
            "ept",
            off,
            true,
            "guests run on shadow page tables, far more code of the kernel",
        ),
        (
            "kvm_amd",
            "npt",
            off,
            true,
            "guests run on shadow page tables, far more code of the kernel",
        ),
    ];
    let mut shown = Vec::new();
    let mut bad = Vec::new();
    for (module, parameter, values, matters, why) in table {
        let Some(value) = host.read(&format!("sys/module/{module}/parameters/{parameter}")) else {
            continue;
        };
        if matters && values.contains(&value.as_str()) {
            bad.push(format!("{module}.{parameter}={value}: {why}"));
        }
        shown.push(format!("{parameter}={value}"));
    }
    match (bad.as_slice(), shown.as_slice()) {
        ([], []) => Finding::info(name, "KVM's modules are not loaded, or show no parameters"),
        ([], shown) => Finding::fine(name, shown.join(", ")),
        (bad, _) => Finding::warn(
            name,
            Problem::new(
                bad.join("; "),
                "give KVM's modules their defaults, in /etc/modprobe.d and on the kernel's command line",
            ),
        ),
    }
}

fn ksm(host: &Files<'_>) -> Finding {
    let name = "ksm";
    match host.read("sys/kernel/mm/ksm/run").as_deref() {
        None => Finding::fine(name, "this kernel merges no pages"),
        Some("1") => Finding::warn(
            name,
            Problem::new(
                "on: the time of a write tells whether another process has an equal page. A VMM asks for no merging, but \
                 inherits it if the daemon's unit has MemoryKSM=yes",
                "echo 2 > /sys/kernel/mm/ksm/run, unless another program needs it",
            ),
        ),
        Some(_) => Finding::fine(name, "off"),
    }
}

fn core_pattern(host: &Files<'_>) -> Finding {
    let name = "core dumps";
    let pattern = host
        .read("proc/sys/kernel/core_pattern")
        .unwrap_or_default();
    let kept_out = "a VMM and a file server leave none, because they are not dumpable";
    match pattern.strip_prefix('|') {
        Some(program) => {
            let program = program.split_whitespace().next().unwrap_or_default();
            Finding::info(
                name,
                format!("piped to {program}, which runs as root; {kept_out}"),
            )
        }
        None => Finding::info(name, format!("written to {pattern:?}; {kept_out}")),
    }
}

fn ptrace(host: &Files<'_>) -> Finding {
    let name = "ptrace";
    let between = "VMs are of different users and not dumpable, so none traces another";
    match host.read("proc/sys/kernel/yama/ptrace_scope").as_deref() {
        None => Finding::info(name, format!("no Yama; {between}")),
        Some("0") => Finding::info(
            name,
            format!("Yama allows it between processes of one user; {between}"),
        ),
        Some(scope) => Finding::fine(
            name,
            format!("restricted by Yama (ptrace_scope {scope}); {between}"),
        ),
    }
}

fn user_namespaces(host: &Files<'_>) -> Finding {
    let name = "user ns";
    let off = [
        ("proc/sys/user/max_user_namespaces", "0"),
        ("proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ];
    let why = off
        .into_iter()
        .find(|(path, value)| host.read(path).as_deref() == Some(*value));
    match why {
        None => Finding::fine(
            name,
            "allowed: each VMM has a user namespace in which nobody is root",
        ),
        Some((path, value)) => Finding::info(
            name,
            format!(
                "/{path} is {value}: VMMs have no user namespace of their own. They have no capabilities anyway"
            ),
        ),
    }
}

fn landlock(host: &Files<'_>) -> Finding {
    let name = "landlock";
    match host.read("sys/kernel/security/lsm") {
        None => Finding::info(name, "not known: /sys/kernel/security is not mounted"),
        Some(list) if list.split(',').any(|lsm| lsm == "landlock") => {
            Finding::fine(name, "a second wall behind the empty root of each VMM")
        }
        Some(list) => Finding::warn(
            name,
            Problem::new(
                format!(
                    "not active ({list}): the empty root is the only wall between a VMM and paths"
                ),
                "add landlock to lsm= on the kernel's command line (CONFIG_SECURITY_LANDLOCK, Linux 5.13)",
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    /// A host with these files.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        directory
    }

    fn flaw(name: &str) -> String {
        format!("{FLAWS}/{name}")
    }

    fn find<'a>(findings: &'a [Finding], name: &str) -> &'a Finding {
        findings
            .iter()
            .find(|finding| finding.name == name)
            .unwrap()
    }

    #[test]
    fn a_host_as_it_should_be_has_no_warning() {
        let (l1tf, multihit) = (flaw("l1tf"), flaw("itlb_multihit"));
        let host = host(&[
            (
                &l1tf,
                "Mitigation: PTE Inversion; VMX: flush not necessary, SMT disabled",
            ),
            (&multihit, NOT_AFFECTED),
            ("sys/module/kvm/parameters/nx_huge_pages", "N"),
            ("sys/module/kvm/parameters/ignore_msrs", "N"),
            ("sys/module/kvm_intel/parameters/vmentry_l1d_flush", "cond"),
            ("sys/module/kvm_intel/parameters/ept", "Y"),
            ("sys/kernel/mm/ksm/run", "0"),
            (
                "proc/sys/kernel/core_pattern",
                "|/usr/lib/systemd/systemd-coredump %P %u",
            ),
            ("proc/sys/kernel/yama/ptrace_scope", "1"),
            ("proc/sys/user/max_user_namespaces", "31000"),
            (
                "sys/kernel/security/lsm",
                "lockdown,capability,landlock,yama",
            ),
        ]);
        let findings = look_below(host.path(), Cores::Shared, Support::NoSmt);
        for finding in &findings {
            assert!(
                finding.ok && finding.verdict != Verdict::Warn,
                "{finding:?}"
            );
        }
        let cpu = &find(&findings, "cpu flaws").found;
        assert_eq!(cpu, "of 2 known ones this CPU has 1, all mitigated");
        let dumps = &find(&findings, "core dumps").found;
        assert!(
            dumps.starts_with("piped to /usr/lib/systemd/systemd-coredump, "),
            "{dumps}"
        );
    }

    #[test]
    fn what_weakens_a_host_is_a_warning_that_names_it() {
        let (mds, multihit) = (flaw("mds"), flaw("itlb_multihit"));
        let spectre = flaw("spectre_v2");
        let host = host(&[
            (&mds, "Mitigation: Clear CPU buffers; SMT vulnerable"),
            (&multihit, "KVM: Vulnerable"),
            (&spectre, "Vulnerable, IBPB: disabled"),
            ("sys/module/kvm/parameters/nx_huge_pages", "never"),
            ("sys/module/kvm/parameters/enable_vmware_backdoor", "Y"),
            ("sys/module/kvm_amd/parameters/npt", "0"),
            ("sys/kernel/mm/ksm/run", "1"),
            ("sys/kernel/security/lsm", "capability,yama"),
        ]);
        let findings = look_below(host.path(), Cores::Shared, Support::Works);
        for (name, word) in [
            (
                "cpu flaws",
                "itlb_multihit (KVM: Vulnerable), spectre_v2 (Vulnerable, IBPB",
            ),
            ("smt", "leaks: mds"),
            ("kvm options", "kvm.nx_huge_pages=never"),
            ("kvm options", "kvm.enable_vmware_backdoor=Y"),
            ("kvm options", "kvm_amd.npt=0"),
            ("ksm", "on"),
            ("landlock", "not active (capability,yama)"),
        ] {
            let finding = find(&findings, name);
            assert_eq!(finding.verdict, Verdict::Warn, "{name}");
            assert!(finding.found.contains(word), "{}", finding.found);
            assert!(finding.ok && !finding.remedy.is_empty(), "{name}");
        }
    }

    #[test]
    fn core_scheduling_is_advised_where_it_would_add_something() {
        let flaws = BTreeMap::new();
        let table = [
            (Support::NoSmt, Cores::Shared, Verdict::Ok, ""),
            (Support::NoSmt, Cores::OwnForEachVm, Verdict::Ok, ""),
            (Support::Works, Cores::OwnForEachVm, Verdict::Ok, ""),
            (
                Support::Works,
                Cores::Shared,
                Verdict::Warn,
                "sandbox.core_scheduling",
            ),
            (
                Support::Missing,
                Cores::Shared,
                Verdict::Warn,
                "CONFIG_SCHED_CORE",
            ),
            (
                Support::Missing,
                Cores::OwnForEachVm,
                Verdict::Warn,
                "CONFIG_SCHED_CORE",
            ),
        ];
        for (support, cores, verdict, word) in table {
            let finding = smt(&flaws, cores, support);
            assert_eq!(finding.verdict, verdict, "{support:?} {cores:?}");
            assert!(finding.remedy.contains(word), "{}", finding.remedy);
        }
    }

    #[test]
    fn a_host_that_shows_nothing_is_no_failure() {
        let host = host(&[]);
        let findings = look_below(host.path(), Cores::Shared, Support::Missing);
        assert!(findings.iter().all(|finding| finding.ok));
        let host = self::host(&[("proc/sys/kernel/unprivileged_userns_clone", "0")]);
        let found = user_namespaces(&Files(host.path())).found;
        assert!(found.contains("unprivileged_userns_clone is 0"), "{found}");
    }
}
