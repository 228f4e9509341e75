from guarded import demo, executor_requests, guard, safety, sets  # noqa: F401
