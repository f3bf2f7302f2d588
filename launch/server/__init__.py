"""megatron-lowbit serve: OpenAI's HTTP interface (protocol, answers, app) over requests in flight (jobs, scheduler)."""
