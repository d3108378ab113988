// SPDX-License-Identifier: Apache-2.0
//! Which files of modules stand for what the kernel asks for, by the texts of `depmod`: `modules.dep` says what each module
//! needs, `modules.alias` by which names it can be asked for. Pure.

/// The two texts.
#[derive(Debug)]
pub struct Index<'a> {
    dependencies: &'a str,
    aliases: &'a str,
}

impl<'a> Index<'a> {
    pub fn new(dependencies: &'a str, aliases: &'a str) -> Self {
        Self {
            dependencies,
            aliases,
        }
    }

    /// The files to load, in order. Empty if there is no module of this name or alias.
    pub fn files(&self, wanted: &str) -> Vec<&'a str> {
        let wanted = plain(wanted);
        let mut files = Vec::new();
        if self.add(&wanted, &mut files) {
            return files;
        }
        for line in self.aliases.lines() {
            let mut words = line.split_ascii_whitespace();
            if let (Some("alias"), Some(pattern), Some(module)) =
                (words.next(), words.next(), words.next())
                && matches(plain(pattern).as_bytes(), wanted.as_bytes())
            {
                self.add(&plain(module), &mut files);
            }
        }
        files
    }

    /// Adds a module, behind those that it needs. Returns whether it exists.
    fn add(&self, module: &str, files: &mut Vec<&'a str>) -> bool {
        let mut lines = self
            .dependencies
            .lines()
            .filter_map(|line| line.split_once(':'));
        let Some((file, needed)) = lines.find(|(file, _)| name(file) == module) else {
            return false;
        };
        // `depmod` writes those that need others before them.
        let needed = needed.split_ascii_whitespace().rev();
        for file in needed.chain([file]) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        true
    }
}

/// The name of the module in a file: `kernel/net/sctp/sctp.ko`.
fn name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    plain(base.strip_suffix(".ko").unwrap_or(base))
}

/// To the kernel, `-` and `_` in names of modules are the same.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// Whether a text is what a pattern means. `*` and `?` are the only signs of patterns that our modules' aliases have.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on if what follows the last `*` does not fit: it takes one more character then.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&sign) if sign == b'?' || Some(&sign) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern
        .get(p..)
        .is_some_and(|rest| rest.iter().all(|&sign| sign == b'*'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/net/sctp/sctp.ko: kernel/net/ipv4/udp_tunnel.ko kernel/lib/libcrc32c.ko
kernel/lib/libcrc32c.ko:
kernel/net/ipv4/udp_tunnel.ko:
kernel/net/netfilter/xt_owner.ko: kernel/net/netfilter/x_tables.ko
kernel/net/netfilter/x_tables.ko:
kernel/crypto/sha256-generic.ko:
kernel/arch/x86/crypto/sha256-ssse3.ko:
";
    const ALIASES: &str = "\
# Aliases extracted from modules themselves.
alias net-pf-2-proto-132 sctp
alias ipt_owner xt_owner
alias crypto-sha256 sha256_generic
alias crypto-sha256 sha256_ssse3
alias cpu:type:x86,ven*fam*mod*:feature:*0081* sha256_ssse3
alias gone-* removed
";

    #[test]
    fn a_name_or_an_alias_stands_for_files_in_order() {
        let index = Index::new(DEPENDENCIES, ALIASES);
        let sctp = [
            "kernel/lib/libcrc32c.ko",
            "kernel/net/ipv4/udp_tunnel.ko",
            "kernel/net/sctp/sctp.ko",
        ];
        let owner = [
            "kernel/net/netfilter/x_tables.ko",
            "kernel/net/netfilter/xt_owner.ko",
        ];
        let sha = [
            "kernel/crypto/sha256-generic.ko",
            "kernel/arch/x86/crypto/sha256-ssse3.ko",
        ];
        let table: [(&str, &[&str]); 10] = [
            ("sctp", &sctp),
            ("net-pf-2-proto-132", &sctp),
            ("ipt_owner", &owner),
            ("xt-owner", &owner),
            ("crypto-sha256", &sha),
            ("sha256-generic", &sha[..1]),
            ("net-pf-2-proto-13", &[]),
            ("gone-away", &[]),
            ("../../etc/passwd", &[]),
            ("", &[]),
        ];
        for (wanted, files) in table {
            assert_eq!(index.files(wanted), files, "{wanted}");
        }
    }

    #[test]
    fn patterns_match_as_a_shell_does() {
        let table = [
            ("a*c", "abbc", true),
            ("a*c", "abb", false),
            ("*", "", true),
            ("a*b*c", "axbxbxc", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("abc", "abcd", false),
            ("", "", true),
            ("", "a", false),
            ("*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ];
        for (pattern, text, expected) in table {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }
}
