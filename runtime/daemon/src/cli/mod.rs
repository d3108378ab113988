#[derive(Debug, clap::Subcommand)]
pub enum Command { Ps }
pub async fn execute(_: Command, _: &std::path::Path) -> std::process::ExitCode { std::process::ExitCode::FAILURE }
