#include "uring_driver.h"

#include <algorithm>
#include <cerrno>

namespace memlane {

namespace {

constexpr unsigned kFewReads = 16;  // in flight: latency counts, not the processor's time
constexpr std::chrono::milliseconds kTick{20};

}  // namespace

std::unique_ptr<UringDriver> UringDriver::make(std::shared_ptr<ReadQueue> queue, const Options& options,
                                               std::string& reason) {
  std::unique_ptr<UringDriver> driver(new UringDriver(std::move(queue), options));
  if (!driver->ring_.open(options.depth, reason)) return nullptr;
  driver->options_.depth = std::min(options.depth, driver->ring_.entries());
  if (options.fixed_buffers)
    driver->options_.fixed_buffers = driver->ring_.register_buffer(driver->buffers_->data(), driver->buffers_->size());
  driver->operations_.resize(driver->options_.depth);
  for (std::uint32_t i = driver->options_.depth; i-- > 0;) driver->idle_.push_back(i);
  driver->background_ = std::thread([driver = driver.get()] { driver->run_in_background(); });
  return driver;
}

UringDriver::UringDriver(std::shared_ptr<ReadQueue> queue, const Options& options)
    : queue_(std::move(queue)), options_(options), buffers_(std::make_unique<Buffers>(options.buffers)) {}

UringDriver::~UringDriver() {
  if (!background_.joinable()) return;
  {
    std::lock_guard lock(queue_->mutex);
    queue_->stop = true;
  }
  backlog_.notify_all();
  background_.join();
  {
    std::lock_guard lock(queue_->mutex);
    for (ReadOperation& operation : operations_) queue_->abandon(operation, ECANCELED);
  }
  for (int patience = 50; in_kernel_ > 0 && broken_ == 0 && patience > 0; --patience) {
    broken_ = ring_.wait(kTick, false);
    Uring::Completion completion{};
    while (ring_.next_completion(completion)) --in_kernel_;
  }
  // What the kernel may still write to must not become other memory.
  if (in_kernel_ > 0) static_cast<void>(buffers_.release());
}

void UringDriver::queue_read(std::uint32_t place) {
  const ReadOperation& operation = operations_[place];
  ring_.queue_read(options_.file, operation.buffer + operation.done, operation.extent.length - operation.done,
                   operation.extent.offset + operation.done, place, options_.fixed_buffers);
  ++in_kernel_;
}

void UringDriver::fill() {
  while (!idle_.empty() && broken_ == 0) {
    const Extent* const next = queue_->peek();
    if (next == nullptr) return;
    std::uint8_t* const buffer = buffers_->take(next->length);
    if (buffer == nullptr) return;
    const std::uint32_t place = idle_.back();
    idle_.pop_back();
    queue_->take(operations_[place]);
    operations_[place].buffer = buffer;
    if (!operations_[place].hangs) queue_read(place);
  }
}

void UringDriver::submit() {
  if (broken_ == 0) broken_ = ring_.submit();
}

void UringDriver::release(std::uint32_t place) {
  buffers_->give_back(operations_[place].buffer, operations_[place].extent.length);
  operations_[place].buffer = nullptr;
  idle_.push_back(place);
}

bool UringDriver::reap() {
  bool any = false;
  Uring::Completion completion{};
  while (ring_.next_completion(completion)) {
    --in_kernel_;
    any = true;
    const auto place = static_cast<std::uint32_t>(completion.tag);
    if (queue_->settle(operations_[place], completion.result) == ReadQueue::Outcome::again)
      queue_read(place);
    else
      release(place);
  }
  return any;
}

// Fails what has been under way for too long. A read that the kernel holds keeps its buffer until it ends after all.
void UringDriver::look_after_late_ones() {
  const auto now = ReadQueue::Clock::now();
  if (now - looked_ < kTick) return;
  looked_ = now;
  for (std::uint32_t place = 0; place < operations_.size(); ++place) {
    ReadOperation& operation = operations_[place];
    if (operation.buffer == nullptr) continue;
    if (broken_ != 0) queue_->abandon(operation, broken_);
    if (queue_->late(operation, now)) queue_->abandon(operation, ETIMEDOUT);
    if (!operation.hangs || queue_->still_hangs(operation)) continue;
    operation.hangs = false;
    if (operation.request != nullptr)
      queue_read(place);
    else
      release(place);
  }
  queue_->expire_backlog(broken_ == 0 ? now : ReadQueue::Clock::time_point::max());
}

// One round of submitting, waiting and taking completions, on behalf of everybody.
void UringDriver::drive(std::unique_lock<std::mutex>& lock, std::chrono::nanoseconds patience) {
  if (driving_) {
    queue_->changed.wait_for(lock, patience);
    return;
  }
  driving_ = true;
  fill();
  submit();
  if (!reap() && patience.count() > 0) {
    const bool few = in_kernel_ <= kFewReads && !queue_->has_backlog();
    if (in_kernel_ == 0 || broken_ != 0) {
      queue_->changed.wait_for(lock, std::min<std::chrono::nanoseconds>(patience, std::chrono::milliseconds(1)));  // all that is left hangs
    } else {
      lock.unlock();
      const int error = ring_.wait(patience, few);
      lock.lock();
      if (error != 0) broken_ = error;
    }
    reap();
  }
  fill();
  submit();
  look_after_late_ones();
  driving_ = false;
  queue_->changed.notify_all();
}

void UringDriver::started() {
  std::lock_guard lock(queue_->mutex);
  fill();
  submit();
  if (queue_->has_backlog()) backlog_.notify_one();
}

void UringDriver::wait(ReadRequest& request, std::size_t seen, ReadQueue::Clock::time_point until) {
  std::unique_lock lock(queue_->mutex);
  while (!request.done() && request.settled <= seen) {
    const auto left = until - ReadQueue::Clock::now();
    drive(lock, std::clamp<std::chrono::nanoseconds>(left, std::chrono::nanoseconds(0), kTick));
    if (left.count() <= 0) return;
  }
}

void UringDriver::run_in_background() {
  std::unique_lock lock(queue_->mutex);
  while (true) {
    backlog_.wait(lock, [this] { return queue_->stop || queue_->has_backlog(); });
    if (queue_->stop) return;
    drive(lock, kTick);
  }
}

}  // namespace memlane
