// asynq's no-op: `asynq enqueue N`, or `asynq work CONCURRENCY`. It counts as counted.py does.
package main

import (
	"context"
	"log"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/hibiken/asynq"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("expected `enqueue N` or `work CONCURRENCY`")
	}
	number, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	redis := asynq.RedisClientOpt{Network: "unix", Addr: os.Getenv("PEERS_REDIS")}
	if os.Args[1] == "enqueue" {
		enqueue(redis, number)
		return
	}
	counter := newCounter()
	server := asynq.NewServer(redis, asynq.Config{Concurrency: number, LogLevel: asynq.ErrorLevel})
	err = server.Run(asynq.HandlerFunc(func(context.Context, *asynq.Task) error {
		atomic.AddUint64(counter, 1)
		return nil
	}))
	if err != nil {
		log.Fatal(err)
	}
}

// enqueue sends over several connections at once; this is not measured.
func enqueue(redis asynq.RedisClientOpt, number int) {
	const connections = 8
	client := asynq.NewClient(redis)
	defer client.Close()
	var group sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(number))
	for range connections {
		group.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := client.Enqueue(asynq.NewTask("noop", nil)); err != nil {
					log.Fatal(err)
				}
			}
		})
	}
	group.Wait()
}

// newCounter maps a new file of eight bytes; the processor's byte order is the reader's.
func newCounter() *uint64 {
	file, err := os.CreateTemp(os.Getenv("PEERS_COUNTERS"), "asynq")
	if err != nil {
		log.Fatal(err)
	}
	if err := file.Truncate(8); err != nil {
		log.Fatal(err)
	}
	shared := syscall.PROT_READ | syscall.PROT_WRITE
	cells, err := syscall.Mmap(int(file.Fd()), 0, 8, shared, syscall.MAP_SHARED)
	if err != nil {
		log.Fatal(err)
	}
	return (*uint64)(unsafe.Pointer(&cells[0]))
}
