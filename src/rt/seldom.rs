use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// A future that is polled when it was woken itself, and not each time that its task is polled for the sake of others.
pub struct Seldom<F> {
    future: Pin<Box<F>>,
    bell: Arc<Bell>,
}

impl<F> Seldom<F> {
    pub(super) fn new(future: F) -> Self {
        let bell = Bell { rung: AtomicBool::new(true), task: AtomicWaker::new() };
        Self { future: Box::pin(future), bell: Arc::new(bell) }
    }
}

impl<F> fmt::Debug for Seldom<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seldom({:?})", self.bell.rung)
    }
}

/// What the future wakes.
struct Bell {
    rung: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::SeqCst);
        self.task.wake();
    }
}

impl<F: Future> Future for Seldom<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        // First this: what rings from here on wakes the task.
        self.bell.task.register(context.waker());
        if !self.bell.rung.load(Ordering::SeqCst) {
            return Poll::Pending;
        }
        self.bell.rung.store(false, Ordering::SeqCst);
        let waker = Waker::from(Arc::clone(&self.bell));
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::{FutureExt as _, future::join};
    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn it_is_polled_when_it_was_woken_only() {
        let (told, mut polls) = (Notify::new(), 0);
        {
            let mut inner = Box::pin(told.notified());
            let mut seldom = Seldom::new(poll_fn(|context| {
                polls += 1;
                inner.as_mut().poll(context)
            }));
            for _ in 0..10 {
                assert!((&mut seldom).now_or_never().is_none());
            }
            // In another task, as it were, which is woken all the same.
            let told = async {
                tokio::task::yield_now().await;
                told.notify_waiters();
            };
            join(&mut seldom, told).await;
        }
        assert_eq!(polls, 2);
    }
}
