pub async fn run(_: &crate::config::Config, _: bool) -> std::process::ExitCode { std::process::ExitCode::FAILURE }
