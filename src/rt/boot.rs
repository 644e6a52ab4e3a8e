use std::{io, time::Duration};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// Between two looks at the clock where the system has no timer for it.
const LOOK: Duration = Duration::from_millis(100);

/// Time since the machine started, with the time that it was suspended: what a lease is measured by. The same for all
/// processes of the machine.
pub fn boot_time() -> Duration {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(tv_sec).unwrap_or_default(), u32::try_from(tv_nsec).unwrap_or_default())
}

/// Returns once it is `at` by [`boot_time`]; after a suspension at once, where other timers would still wait.
pub async fn sleep_until_boot(at: Duration) {
    while boot_time() < at {
        if wait(at).await.is_err() {
            tokio::time::sleep(LOOK.min(at.saturating_sub(boot_time()))).await;
        }
    }
}

#[allow(
    deprecated,
    reason = "unsound only for what changes its descriptor, which an OwnedFd does not; the other is unsafe"
)]
async fn wait(at: Duration) -> io::Result<()> {
    let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    let it_value = Timespec {
        tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: at.subsec_nanos().into(),
    };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
    timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &once)?;
    AsyncFd::new(timer)?.readable().await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_sleeps_until_then_and_not_shorter() {
        let at = boot_time() + Duration::from_millis(30);
        sleep_until_boot(at).await;
        assert!(boot_time() >= at);
        sleep_until_boot(at).await;
        assert!(wait(at).await.is_ok(), "there is a timer for it");
    }
}
