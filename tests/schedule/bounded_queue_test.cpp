// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/bounded_queue.hpp"

#include <atomic>
#include <stdexcept>
#include <thread>

#include "support/catch.hpp"
#include "support/pattern_store.hpp"

using sida::BoundedQueue;

TEST_CASE("Values come out in the order in which they went in", "[queue]") {
  BoundedQueue<int> queue(3);
  std::thread producer([&] {
    for (int i = 0; i < 100; ++i) queue.push(i);
    queue.close();
  });
  for (int i = 0; i < 100; ++i) CHECK(queue.pop() == i);
  CHECK_FALSE(queue.pop());
  producer.join();
}

TEST_CASE("A full queue holds the producer back", "[queue]") {
  BoundedQueue<int> queue(2);
  std::atomic<int> pushed = 0;
  std::thread producer([&] {
    for (int i = 0; i < 3; ++i) {
      queue.push(i);
      ++pushed;
    }
  });
  REQUIRE(sida::test::eventually([&] { return pushed == 2; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(pushed == 2);
  CHECK(queue.pop() == 0);
  CHECK(sida::test::eventually([&] { return pushed == 3; }));
  producer.join();
}

TEST_CASE("The exception that a queue is closed with comes once, behind the values", "[queue]") {
  BoundedQueue<int> queue(2);
  queue.push(1);
  queue.close(std::make_exception_ptr(std::runtime_error("no more")));
  CHECK_FALSE(queue.push(2));
  CHECK(queue.pop() == 1);
  CHECK_THROWS_WITH(queue.pop(), "no more");
  CHECK_FALSE(queue.pop());
}

TEST_CASE("Abandoning a queue ends every wait", "[queue]") {
  BoundedQueue<int> full(1), empty(1);
  full.push(1);
  std::thread producer([&] { CHECK_FALSE(full.wait_for_room()); });
  std::thread consumer([&] { CHECK_FALSE(empty.pop()); });
  full.abandon();
  empty.abandon();
  producer.join();
  consumer.join();
  CHECK_FALSE(full.pop());
}
