//! How much memory a thread holds: for tests that hold a parser to a bound.
//!
//! A test program takes [`Meter`] as its allocator (`#[global_allocator]`) and asks [`peak_of`].

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting for each thread.
#[derive(Debug)]
pub struct Meter;

thread_local! {
    /// What the thread has allocated and not given back, and the most of that. Below zero where it gives back what others
    /// have allocated. Constant and without destructor, as allocators must not allocate.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// Counts `bytes` more or fewer. A thread that ends is past counting.
fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        let (now, peak) = held.get();
        let now = now.wrapping_add(bytes);
        held.set((now, peak.max(now)));
    });
}

// SAFETY: each call is passed on to the system's allocator unchanged, which keeps the contract; counting does not allocate.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise about `layout` is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise about `layout` is handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(layout.size().cast_signed().wrapping_neg());
        // SAFETY: `memory` came from the calls above with this layout, by the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.cast_signed().wrapping_sub(layout.size().cast_signed()));
        // SAFETY: the caller's promises about `memory`, `layout` and `size` are handed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// The most that this thread has held during `work`, beyond what it held before; 0 where [`Meter`] is not the allocator.
pub fn peak_of(work: &mut dyn FnMut()) -> usize {
    let begun = HELD.with(|held| {
        let (now, _) = held.get();
        held.set((now, now));
        now
    });
    work();
    HELD.with(|held| usize::try_from(held.get().1.wrapping_sub(begun)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_at_once_is_what_counts() {
        let peak = peak_of(&mut || {
            let first = vec![1_u8; 1 << 20];
            drop(first);
            let mut second = Vec::with_capacity(1);
            second.resize(3 << 20, 1_u8);
        });
        assert!((3 << 20..4 << 20).contains(&peak), "{peak}");
        assert_eq!(peak_of(&mut || ()), 0);
    }
}
